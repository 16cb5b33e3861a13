"""Which tokens of a KV cache to keep: methods that score them, budgets, and what they are shown. NumPy only."""

from specqd.selection.budget import Budget
from specqd.selection.expected_attention import ExpectedAttention
from specqd.selection.h2o import H2O
from specqd.selection.keep import RECENT, SINKS, keep, layer_budgets
from specqd.selection.key_diff import KeyDiff
from specqd.selection.key_norm import KeyNorm
from specqd.selection.kvcrush import KVCrush
from specqd.selection.method import Method, method
from specqd.selection.observed import Observed, compact
from specqd.selection.pyramidkv import PyramidKV
from specqd.selection.r_kv import RKV
from specqd.selection.snapkv import SnapKV
from specqd.selection.streaming_llm import StreamingLLM
from specqd.selection.tova import TOVA
from specqd.selection.uniform import Uniform

__all__ = [
    "H2O",
    "RECENT",
    "RKV",
    "SINKS",
    "TOVA",
    "Budget",
    "ExpectedAttention",
    "KVCrush",
    "KeyDiff",
    "KeyNorm",
    "Method",
    "Observed",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "Uniform",
    "compact",
    "keep",
    "layer_budgets",
    "method",
]

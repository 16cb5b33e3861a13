"""Compiled functions of a program in this process, without an artifact: called as the runtime calls them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from transformers import AutoModelForCausalLM, LlamaConfig

from specqd.build import default_pipeline
from specqd.codegen.isa import ISA, TABLE, named
from specqd.codegen.library import machine_code
from specqd.codegen.lower.function import lower
from specqd.codegen.lower.last_row import last_row
from specqd.codegen.lower.step import Parameter
from specqd.codegen.pack import pack
from specqd.frontends import capture
from specqd.manifest import BLOCK
from specqd.passes import Pipeline
from specqd.program import Program
from specqd.reference import propagate
from specqd.runtime.cpu import cpu_features
from specqd.runtime.library import aligned, set_threads, tensor
from specqd.runtime.tiles import permit_tiles

__all__ = [
    "EXTENDED",
    "NATIVE",
    "RUNNABLE",
    "Compiled",
    "Lowered",
    "array",
    "assembly",
    "jit",
    "llama",
    "lowered",
    "random_tokens",
    "threads",
    "with_bf16_activations",
]


def _start_threads(count: int) -> None:
    """Start the thread pool with `count` threads, bound to no CPU, unless this process has started it before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_BIND_THREADS", "0")
        patch.setenv("TVM_NUM_THREADS", str(count))
        tvm_ffi.get_global_func("runtime.NumThreads")()


# Left alone, TVM counts half of the CPUs, and two CPUs would be one thread: without races to see.
_start_threads(2)
if "amx_tile" in cpu_features():
    permit_tiles()

NATIVE = named("native", cpu_features())

EXTENDED = (pytest.mark.slow, pytest.mark.extended)
"""Marks of what costs more time than the default run has: `pytest -m extended`."""

RUNNABLE = tuple(name for name, isa in TABLE.items() if cpu_features().issuperset(isa.features))
"""Names of the instruction sets that this CPU has, best first."""


@dataclass(frozen=True)
class Lowered:
    """A function before it is compiled."""

    symbol: str
    function: Any
    parameters: list[Parameter]


def lowered(program: Program, entry: str, rows: int, isa: ISA = NATIVE, last_only: bool = False) -> Lowered:
    """Lower an entry of a program, as specqd.codegen.build does."""
    given = program.entry(entry)
    propagate(program, given, rows)
    if last_only:
        given = last_row(given)
        propagate(program, given, rows)
    symbol = f"{entry}_{rows}"
    return Lowered(symbol, *lower(program, given, isa, rows, symbol, last_only))


def jit(functions: dict[str, Any], isa: ISA = NATIVE) -> Any:
    """Compile TIR functions and load them; index the result by symbol."""
    return _compile(functions, isa).jit()


def assembly(functions: dict[str, Any], isa: ISA) -> str:
    """Compile TIR functions, for a CPU that need not be this one, to assembly text."""
    return _compile(functions, isa).mod.inspect_source("asm")


def _compile(functions: dict[str, Any], isa: ISA) -> Any:
    return machine_code(tvm.IRModule(functions), isa)


@contextmanager
def threads(count: int) -> Iterator[int]:
    """Let compiled code use `count` threads; gives how many it gets."""
    number = tvm_ffi.get_global_func("runtime.NumThreads")
    before = number()
    set_threads(count)
    try:
        yield number()
    finally:
        set_threads(before)


class Compiled:
    """The entries of a program, compiled for one number of rows when that is first fed.

    Everything is kept in numpy arrays: `caches` by name, shared by all functions; scratch and outputs are filled
    with nonsense before each call, since nobody may rely on what they hold. The caches hold `SEQUENCES` sequences,
    whose blocks of positions lie scattered.
    """

    SEQUENCES = 3

    def __init__(self, program: Program, isa: str | None = None) -> None:
        self.program, self.isa = program, TABLE[isa] if isa else NATIVE
        self.caches: dict[str, np.ndarray] = {}
        self._weights: dict[str, Any] = {}
        most = max((c.capacity for c in program.caches.values()), default=BLOCK)
        each = -(-most // BLOCK)
        self.pool = self.SEQUENCES * each
        # A sequence's tables: which one it is, none of its own for each plane, nothing missing, its blocks.
        self.blocks = array((self.SEQUENCES, 3 + each), "int32")
        self.blocks[:, 0] = np.arange(self.SEQUENCES)
        self.tables = self.blocks[:, 3:]
        self.tables[:] = np.random.default_rng(0).permutation(self.pool).reshape(-1, each)
        self.received: dict[str, np.ndarray] = {}
        self._functions: dict[tuple[str, int, bool], tuple[Any, list[Any], dict[str, np.ndarray]]] = {}

    def feed(
        self, entry: str, tokens: Sequence[int], start: int, last_only: bool = False, sequence: int = 0
    ) -> np.ndarray:
        """Feed consecutive positions from `start`; return logits float32 `[rows or 1, vocab]`."""
        return self.feed_rows(entry, [(t, start + i, sequence) for i, t in enumerate(tokens)], last_only)

    def feed_rows(
        self, entry: str, rows: Sequence[tuple[int, int, int]], last_only: bool = False
    ) -> np.ndarray:
        """Feed rows of (token, position, sequence); return logits float32 `[rows or 1, vocab]`."""
        call, arguments, arrays = self._function(entry, len(rows), last_only)
        for name, buffer in arrays.items():
            if name not in self.caches:
                buffer.view(np.uint8)[:] = 0xFF  # NaN, and -1
        tokens, positions, sequences = zip(*rows, strict=True)
        arrays["tokens"][:] = tokens
        arrays["positions"][:] = positions
        arrays["tables"][:] = np.array(sequences) * self.blocks.shape[1] + 1
        call(*arguments)
        logits = arrays["logits"].reshape(len(arrays["next"]), -1).copy()
        assert np.array_equal(arrays["next"], logits.argmax(-1)) or np.isnan(logits).any()
        return logits

    def decode(self, entry: str, tokens: Sequence[int], rows: int, start: int = 0) -> np.ndarray:
        """Feed all tokens, `rows` at a time, from `start`; return logits float32 `[len(tokens), vocab]`."""
        steps = range(0, len(tokens), rows)
        return np.concatenate([self.feed(entry, tokens[i : i + rows], start + i) for i in steps])

    def fill_caches(self, bits: int) -> None:
        """Set every BF16 of the caches that are in use to one bit pattern."""
        for buffer in self.caches.values():
            buffer.view(np.uint16)[:] = bits

    def _function(
        self, entry: str, rows: int, last_only: bool
    ) -> tuple[Any, list[Any], dict[str, np.ndarray]]:
        key = entry, rows, last_only
        if key not in self._functions:
            made = lowered(self.program, entry, rows, self.isa, last_only)
            arrays: dict[str, np.ndarray] = {}
            arguments = [self._argument(p, arrays) for p in made.parameters]
            self._functions[key] = jit({made.symbol: made.function}, self.isa)[made.symbol], arguments, arrays
        return self._functions[key]

    def _argument(self, p: Parameter, arrays: dict[str, np.ndarray]) -> Any:
        if p.kind == "weight":
            if p.name not in self._weights:
                self._weights[p.name] = _tensor_like(pack(p.packed, self.program.weights))
            return self._weights[p.name]
        if p.kind == "blocks":
            return tensor(self.blocks.reshape(-1))
        if p.kind in {"cache", "recent"}:
            count = self.pool if p.kind == "cache" else self.SEQUENCES
            buffer = self.caches.setdefault(p.name, array((count * math.prod(p.shape),), p.dtype))
        else:
            buffer = array(p.shape, p.dtype)
        arrays[p.name] = buffer
        if p.kind == "received":
            self.received[p.name] = buffer
        return tensor(buffer)


def array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A zeroed array at a cache line, as compiled code wants it."""
    count = int(np.prod(shape))
    return aligned(count * np.dtype(dtype).itemsize).view(dtype).reshape(shape)


def _tensor_like(values: np.ndarray) -> Any:
    copy = array(values.shape, values.dtype.name)
    copy[...] = values
    return tensor(copy)


@cache
def llama(head_dim: int = 12) -> Program:
    """A random Llama of two layers with its MXFP4 draft, through the default pipeline, for 168 positions.

    It has five query heads, by default of 12 channels, on one key head, a tied table, and 83 tokens: no multiple of 16.
    """
    config = LlamaConfig(
        vocab_size=83,
        hidden_size=160,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=168,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(10)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return Pipeline.parse(default_pipeline(168))(capture(model))


def with_bf16_activations(program: Program, entry: str) -> Program:
    """What BF16 kernels make of the inputs of products with BF16 matrices of even width, on CPUs that have them."""
    rounded = program.copy()
    graph = rounded.entries[entry].graph
    for node in [n for n in graph.nodes if n.target is torch.ops.aten.linear.default]:
        weight = program.weights[str(node.args[1].target)]
        if weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0:
            with graph.inserting_before(node):
                node.update_arg(0, graph.call_function(_bf16_rounded, (node.args[0],)))
    return rounded


def _bf16_rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def random_tokens(program: Program, count: int, rng: torch.Generator) -> list[int]:
    """Tokens at random from the vocabulary."""
    return torch.randint(0, program.model.vocab_size, (count,), generator=rng).tolist()

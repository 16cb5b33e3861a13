"""A CPU compiler for speculative, quantised inference: a checkpoint in, a tuned binary out.

program = specqd.capture("path/to/model")
program = specqd.Pipeline.parse("fuse-rms-norm, insert-kv-cache")(program)
specqd.compile(program, "model.specqd")
specqd.load("model.specqd").generate("Hello").text
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specqd.build import compile_model as compile
    from specqd.errors import SpecqdError as SpecqdError
    from specqd.explanation import explain as explain
    from specqd.frontends.dispatch import capture as capture
    from specqd.frontends.onnx.exporting import export_onnx as export_onnx
    from specqd.passes import Pipeline as Pipeline
    from specqd.program import Program as Program
    from specqd.runtime.opening import load as load
    from specqd.runtime.sampling import Sampling as Sampling
    from specqd.tuning import Tuning as Tuning

__all__ = [
    "Pipeline",
    "Program",
    "Sampling",
    "SpecqdError",
    "Tuning",
    "capture",
    "compile",
    "explain",
    "export_onnx",
    "load",
]

# Where each public name lives; loaded on first use, so that a runtime-only process never meets torch or TVM.
_HOMES = {
    "capture": ("specqd.frontends.dispatch", "capture"),
    "compile": ("specqd.build", "compile_model"),
    "explain": ("specqd.explanation", "explain"),
    "export_onnx": ("specqd.frontends.onnx.exporting", "export_onnx"),
    "load": ("specqd.runtime.opening", "load"),
    "Pipeline": ("specqd.passes", "Pipeline"),
    "Program": ("specqd.program", "Program"),
    "Sampling": ("specqd.runtime.sampling", "Sampling"),
    "SpecqdError": ("specqd.errors", "SpecqdError"),
    "Tuning": ("specqd.tuning", "Tuning"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'specqd' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)

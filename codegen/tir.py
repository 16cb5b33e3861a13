"""The few words in which kernels write TIR: vector loads and stores, loops, intrinsics, parallel phases."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as I  # noqa: N812

__all__ = ["I", "bind", "f32", "i32", "intrinsic", "load", "local", "range_of", "splat", "store", "tirx"]

bind = I.bind


def f32(value: float) -> Any:
    """Make a float32 constant."""
    return tirx.const(value, "float32")


def i32(value: int) -> Any:
    """Make an int32 constant."""
    return tirx.const(value, "int32")


def splat(value: Any, lanes: int) -> Any:
    """Repeat a scalar over `lanes` lanes (a scalar stays itself for one lane)."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def load(buffer: Any, base: Any, lanes: int) -> Any:
    """Load `lanes` neighbouring elements of a flat buffer, as one vector."""
    return tirx.BufferLoad(buffer, [tirx.Ramp(base, 1, lanes) if lanes > 1 else base])


def store(buffer: Any, base: Any, vector: Any, lanes: int) -> None:
    """Store a vector of `lanes` elements at `base` of a flat buffer."""
    I.buffer_store(buffer, vector, [tirx.Ramp(base, 1, lanes) if lanes > 1 else base])


def intrinsic(dtype: str, name: str, *args: Any) -> Any:
    """Call an LLVM intrinsic without side effects."""
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def local(size: int, dtype: str) -> Any:
    """Allocate a small buffer of this thread; constant indices keep it in registers."""
    return I.alloc_local((size,), dtype)


def range_of(extent: int) -> Any:
    """Give the half-open range `[0, extent)` as TVM's object."""
    return tvm.ir.Range(0, extent)

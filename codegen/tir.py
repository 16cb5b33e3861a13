"""The few words in which kernels write TIR: vector loads and stores, loops, intrinsics, parallel phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as I  # noqa: N812

__all__ = [
    "I",
    "bind",
    "f32",
    "i32",
    "intrinsic",
    "load",
    "local",
    "parallel",
    "range_of",
    "splat",
    "store",
    "tirx",
]

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


def prefetch(buffer: Any, at: Any, level: int = 1) -> None:
    """Ask for the cache line of element `at`, down to cache `level`; the CPU ignores it where there is no memory."""
    place = tirx.address_of(buffer[at])
    I.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", place, i32(0), i32(4 - level), i32(1)))


def local(size: int, dtype: str) -> Any:
    """Allocate a small buffer of this thread; with constant indices it lives in registers.

    Keep one below a kilobyte: TVM puts those on the stack, larger ones cost a call to its workspace pool.
    """
    return I.alloc_buffer((size,), dtype)


@contextmanager
def parallel(extent: int) -> Iterator[Any]:
    """Open a loop whose iterations are shared among the threads, each run by exactly one of them.

    A parallel loop of one iteration would be simplified away and its body run by every thread: harmless for a pure
    function of its inputs, wrong for one that updates in place. So it becomes two, of which one does nothing.
    """
    with I.parallel(0, max(extent, 2)) as var:
        if extent > 1:
            yield var
        else:
            with I.If(var < 1), I.Then():
                yield var


def range_of(extent: int) -> Any:
    """Give the half-open range `[0, extent)` as TVM's object."""
    return tvm.ir.Range(0, extent)

"""What this machine can do at most, compiled for this process: read memory, and multiply and add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm

from specqd.codegen.isa import ISA
from specqd.codegen.kernels.multiply_add import multiply_add, multiply_add_flops
from specqd.codegen.kernels.stream import stream_read
from specqd.codegen.library import machine_code

__all__ = ["Yardsticks", "yardsticks"]


@dataclass(frozen=True)
class Yardsticks:
    """Compiled loops for `threads` threads of TVM's pool.

    Attributes:
        read: `read(data int32[n], out int32[512 * lanes])` reads n numbers, a multiple of 512 * lanes.
        compute: `compute(out float32[threads * lanes])` does `flops` multiplications and additions.
    """

    read: Callable[..., None]
    compute: Callable[..., None]
    flops: int
    lanes: int


def yardsticks(isa: ISA, threads: int) -> Yardsticks:
    """Compile the loops, which takes a second or two."""
    loops: dict[str, Any] = {"stream_read": stream_read(isa), "multiply_add": multiply_add(isa, threads)}
    compiled = machine_code(tvm.IRModule(loops), isa).jit()
    flops = multiply_add_flops(isa, threads)
    return Yardsticks(compiled["stream_read"], compiled["multiply_add"], flops, isa.lanes)

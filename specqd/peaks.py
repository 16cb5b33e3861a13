"""What this machine gives at most while other processes do what they do: the measures of `specqd profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specqd.runtime.cpu import cpu_features
from specqd.runtime.library import aligned, set_threads, tensor

__all__ = ["Peaks", "measure_peaks"]

_BYTES = 256 * 2**20  # several times any cache that a desktop or a virtual machine has
_REPEATS = 7


@dataclass(frozen=True)
class Peaks:
    """GB/s of reading memory, and GFLOP/s of float32 multiplications and additions in registers; on `threads`."""

    gbps: float
    gflops: float
    threads: int


def measure_peaks(isa: str, threads: int) -> Peaks:
    """Measure with loops compiled for an instruction set by name, the best of some repeats.

    Call it after an artifact is loaded, which settles how many threads there are.
    """
    from specqd.codegen.isa import named
    from specqd.codegen.yardsticks import yardsticks

    loops = yardsticks(named(isa, cpu_features()), threads)
    data = aligned(_BYTES).view(np.int32)
    data[:] = 1  # pages never written to all show the same page of zeros
    source, sink = tensor(data), tensor(aligned(512 * loops.lanes * 4).view(np.int32))
    result = tensor(aligned(threads * loops.lanes * 4).view(np.float32))
    set_threads(threads)
    seconds = _best(lambda: loops.read(source, sink))
    return Peaks(_BYTES / seconds / 1e9, loops.flops / _best(lambda: loops.compute(result)) / 1e9, threads)


def _best(call: Callable[[], None]) -> float:
    taken = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)

"""How fast this machine's memory can be read by all threads: what decoding is measured against."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import numpy as np

from specqd.errors import ArtifactError
from specqd.runtime.engine import Engine
from specqd.runtime.library import aligned, tensor

__all__ = ["Bandwidth"]

_BYTES = 256 * 2**20  # several times any cache that a desktop or a virtual machine has
_PASSES = 3


class Bandwidth:
    """Reads a large buffer whenever asked to, and keeps the rates.

    `source` says with what: the artifact's own `stream_read` on the engine's threads, or numpy, which may
    fall short of what the memory gives.
    """

    def __init__(self, engine: Engine) -> None:
        self._data = aligned(_BYTES).view(np.int32)
        self._data[:] = 1  # pages never written to all show the same page of zeros
        self._engine = engine
        self._rates: list[float] = []
        compiled = _compiled(engine, self._data)
        self.source = "stream_read" if compiled else "numpy"
        self._read = compiled or self._read_with_numpy

    def measure(self) -> None:
        """Take some samples."""
        self._engine.use_threads(self._engine.threads)
        for _ in range(_PASSES):
            began = time.perf_counter()
            self._read()
            self._rates.append(_BYTES / (time.perf_counter() - began) / 1e9)

    @property
    def gbps(self) -> float:
        """Median rate in GB/s."""
        if not self._rates:
            self.measure()
        return median(self._rates)

    def _read_with_numpy(self) -> None:
        parts = np.array_split(self._data.view(np.float32), self._engine.threads)
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: np.dot(part, part), parts))


def _compiled(engine: Engine, data: np.ndarray) -> Callable[[], None] | None:
    """Return a call of the artifact's `stream_read(data, out)`, if it has one."""
    try:
        read = engine.find("stream_read")
    except ArtifactError:
        return None
    source = tensor(data)
    for lanes in (16, 8, 4):  # the output is 64 tasks x 8 vectors of the instruction set's width
        sink = tensor(aligned(64 * 8 * lanes * 4).view(np.int32))
        with contextlib.suppress(Exception):  # tvm_ffi raises what the compiled check of the shape raised
            read(source, sink)
            return partial(read, source, sink)
    return None

"""How fast this machine's memory can be read by all threads: what decoding is measured against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from specqd.errors import ArtifactError
from specqd.runtime.engine import Engine
from specqd.runtime.library import tensor

__all__ = ["Bandwidth"]

_BYTES = 256 * 2**20  # several times any cache that a desktop or a virtual machine has
_PASSES = 3


class Bandwidth:
    """Reads a large buffer whenever asked to, and keeps the rates.

    `source` says with what: the artifact's own `stream_read` on the engine's threads, or numpy, which may
    fall short of what the memory gives.
    """

    def __init__(self, engine: Engine) -> None:
        self._data = np.ones(_BYTES // 4, np.int32)
        self._threads = engine.threads
        self._rates: list[float] = []
        try:
            read = engine.find("stream_read")
            # More than any instruction set's kernel writes: 64 tasks of 8 vectors of at most 16 values.
            data, out = tensor(self._data), np.zeros(64 * 8 * 16, np.int32)
            sink = tensor(out)
            self.source = "stream_read"
            self._read = lambda: read(data, sink)
        except ArtifactError:
            self.source = "numpy"
            self._read = self._read_with_numpy

    def measure(self) -> None:
        """Take some samples."""
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
        parts = np.array_split(self._data.view(np.float32), self._threads)
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda part: np.dot(part, part), parts))

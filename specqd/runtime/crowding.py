"""Whether other processes want the CPUs too, by the time that the kernel counts."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["Crowding"]

_IDLE = slice(4, 6)  # columns of "cpuN" lines in /proc/stat: idle, and waiting for a disk; see proc(5)


class Crowding:
    """Watches how much CPU time steps get, and how much nobody takes.

    Compiled threads never sleep during a step: they work, or wait at a barrier for those that do. What they lack of the
    time that passes, others had. Steps are judged by `WINDOW` seconds together.
    """

    WINDOW = 0.005
    PERIOD = 0.1  # seconds between two readings of what is left: the kernel counts in hundredths
    SOON = 0.05  # seconds that `others` must have watched

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._began = self._used = self._passed = self._asked = 0.0
        self._first = self._now()
        self._latest = self._first._replace(time=-math.inf)
        self._left = 0.0

    def others(self) -> float:
        """Return how many of this process's CPUs others had since this was made; 0 if that is not known yet."""
        now = self._now()
        if math.isinf(now.idle) or now.time - self._first.time < self.SOON:
            return 0.0
        return len(self._cpus) - _left(self._first, now)

    def begin(self) -> None:
        """Note that a step begins."""
        self._began = time.process_time()

    def lost(self, threads: int, seconds: float) -> float:
        """Note how long a step of so many threads took; return how many CPUs others had lately, 0 if unknown yet."""
        self._used += time.process_time() - self._began
        self._asked += threads * seconds
        self._passed += seconds
        if self._passed < self.WINDOW:
            return 0.0
        lost = (self._asked - self._used) / self._passed
        self._used = self._asked = self._passed = 0.0
        return lost

    def left(self) -> float:
        """Return how many of this process's CPUs others left to it lately; all of them where the system does not say.

        If nobody has asked for long, that is not known yet, and 0. What this process itself did not use counts as left.
        """
        if math.isinf(self._first.idle):
            return math.inf
        passed = time.perf_counter() - self._latest.time
        if passed >= self.PERIOD:
            now = self._now()
            self._left = _left(self._latest, now) if passed < 5 * self.PERIOD else 0.0
            self._latest = now
        return self._left

    def _now(self) -> _Moment:
        return _Moment(time.perf_counter(), time.process_time(), self._idle_seconds())

    def _idle_seconds(self) -> float:
        """Seconds that the CPUs were idle since they were started; infinite where the system does not say."""
        try:
            lines = self._stat.read_text().splitlines()
        except OSError:
            return math.inf
        of_cpus = (line.split() for line in lines if line.startswith("cpu") and line[3:4].isdigit())
        ticks = sum(sum(map(int, fields[_IDLE])) for fields in of_cpus if int(fields[0][3:]) in self._cpus)
        return ticks / os.sysconf("SC_CLK_TCK")


class _Moment(NamedTuple):
    """A time, and how many seconds of CPUs this process had used and nobody had until then."""

    time: float
    used: float
    idle: float


def _left(before: _Moment, now: _Moment) -> float:
    """How many CPUs others left to this process between two moments."""
    return (now.idle - before.idle + now.used - before.used) / (now.time - before.time)

"""Whether other processes want the CPUs too, by the time that the kernel counts."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

__all__ = ["Crowding"]

_IDLE = slice(4, 6)  # columns of "cpuN" lines in /proc/stat: idle, and waiting for a disk; see proc(5)


class Crowding:
    """Watches how much CPU time steps get, and how much nobody takes.

    Compiled threads never sleep during a step: they work, or wait at a barrier for those that do. What they lack of the
    time that passes, others had. Steps are judged by `WINDOW` seconds together.
    """

    WINDOW = 0.005
    PERIOD = 0.1  # seconds between two readings of what is left: the kernel counts in hundredths
    SOON = 0.05

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._began = self._used = self._passed = self._asked = 0.0
        self._read, self._counted = -math.inf, self._idle_ticks()
        self._first = time.perf_counter(), time.process_time(), self._counted
        self._spent = self._left = 0.0

    def others(self) -> float:
        """Return how many of this process's CPUs others had since this was made; 0 if that is not known yet."""
        since, used, counted = self._first
        passed = time.perf_counter() - since
        if counted is None or passed < self.SOON:
            return 0.0
        idle = ((self._idle_ticks() or 0) - counted) / os.sysconf("SC_CLK_TCK")
        return len(self._cpus) - (idle + time.process_time() - used) / passed

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
        if self._counted is None:
            return math.inf
        now = time.perf_counter()
        passed = now - self._read
        if passed >= self.PERIOD:
            ticks, used = self._idle_ticks() or 0, time.process_time()
            idle = (ticks - self._counted) / os.sysconf("SC_CLK_TCK")
            lately = passed < 5 * self.PERIOD
            self._left = (idle + used - self._spent) / passed if lately else 0.0
            self._read, self._counted, self._spent = now, ticks, used
        return self._left

    def _idle_ticks(self) -> int | None:
        try:
            lines = self._stat.read_text().splitlines()
        except OSError:
            return None
        of_cpus = (line.split() for line in lines if line.startswith("cpu") and line[3:4].isdigit())
        return sum(sum(map(int, fields[_IDLE])) for fields in of_cpus if int(fields[0][3:]) in self._cpus)

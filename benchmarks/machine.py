"""The machine under a measurement: what it is, and whether it was left alone meanwhile."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from specqd.codegen.isa import ISA, named
from specqd.runtime.cpu import cpu_features, cpu_name
from specqd.runtime.tiles import permit_tiles

__all__ = ["Quiet", "facts", "in_turns", "instruction_set", "versions"]

T = TypeVar("T")
K = TypeVar("K")

_TICK = os.sysconf("SC_CLK_TCK")


def facts() -> dict[str, str]:
    """CPU, cores, last-level cache and system."""
    fields = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in reversed(Path("/proc/cpuinfo").read_text().splitlines())
        if ":" in line
    )
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return {
        "cpu": f"{cpu_name()} (family {fields.get('cpu family')}, model {fields.get('model')})",
        "cores": str(len(os.sched_getaffinity(0))),
        "l3": cache.read_text().strip() if cache.is_file() else "unknown",
        "system": platform.platform(),
    }


def versions(*names: str) -> dict[str, str]:
    """Versions of installed distributions, without importing them."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def instruction_set(name: str, threads: int) -> ISA:
    """Let this process run compiled kernels of an instruction set on so many threads; return it."""
    isa = named(name, cpu_features())
    os.environ |= {"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0"}
    if isa.tiles:
        permit_tiles()
    return isa


def in_turns(
    runs: Mapping[K, Callable[[int], float]], rounds: int, seconds: float, pause: float = 0.0
) -> dict[K, list[float]]:
    """Take a measurement of each run in each round, which begins with another one each time.

    A run does something so many times and returns the seconds of one; a measurement lasts about `seconds`, and begins
    after a `pause`, in which the threads of others stop spinning.
    """
    repeats = {key: max(3, math.ceil(seconds / run(3))) for key, run in runs.items()}
    taken: dict[K, list[float]] = {key: [] for key in runs}
    order = list(runs)
    for number in range(rounds):
        first = number % len(order)
        for key in order[first:] + order[:first]:
            time.sleep(pause)
            taken[key].append(runs[key](repeats[key]))
    return taken


class Quiet:
    """Runs measurements when no one else uses the CPUs, and repeats those that were disturbed.

    Every engine here meets at barriers, some by spinning: a second busy process can slow one tenfold and
    hardly touch another, so a comparison under load says nothing. `pids` are the processes that belong to the
    benchmark, besides this one.
    """

    LIMIT = 0.08  # cores used by others
    WAIT = 60.0  # seconds for others to finish
    TRIES = 3

    def __init__(self, pids: Collection[int] = ()) -> None:
        self.pids = set(pids) | {os.getpid()}
        self.worst = 0.0  # highest load by others in any result that was kept

    def __call__(self, task: Callable[[], T]) -> T:
        """Return what `task` returns, from its quietest run."""
        best: tuple[float, T] | None = None
        for _ in range(self.TRIES):
            self._await_quiet()
            began, before = time.perf_counter(), self._foreign()
            result = task()
            load = (self._foreign() - before) / (time.perf_counter() - began)
            if best is None or load < best[0]:
                best = load, result
            if load < self.LIMIT:
                break
        assert best
        self.worst = max(self.worst, best[0])
        return best[1]

    def _await_quiet(self) -> None:
        until = time.perf_counter() + self.WAIT
        while time.perf_counter() < until:
            before = self._foreign()
            time.sleep(0.25)
            if (self._foreign() - before) / 0.25 < self.LIMIT:
                return

    def _foreign(self) -> float:
        """CPU seconds that everyone else has used, stolen time included."""
        with open("/proc/stat") as lines:
            user, nice, system, _, _, irq, soft, steal, *_ = map(int, next(lines).split()[1:])
        return (user + nice + system + irq + soft + steal) / _TICK - sum(map(_cpu_seconds, self.pids))


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICK

"""How many CPUs this process may use, and how many it pays to use while others want them too."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import deque
from collections.abc import Hashable, Iterator
from pathlib import Path, PurePosixPath

__all__ = ["ThreadChoice", "available_cpus", "cgroup_quota"]


def available_cpus() -> int:
    """CPUs that the scheduler's affinity mask and the CPU quota of the control groups leave, at least 1."""
    counted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, min(counted, int(quota) if quota else counted))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Smallest CPU quota of this process's control groups (v1 or v2) and their parents, in CPUs, if any."""
    quotas: list[float] = []
    for folder in _cgroup_folders(root):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").is_file():
                limit, period = (folder / "cpu.max").read_text().split()
            else:
                limit = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if limit not in {"max", "-1"} and float(period) > 0:
                quotas.append(float(limit) / float(period))
    return min(quotas, default=None)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """Every folder from the process's own cgroup up to the mount, for v2 and for v1's `cpu` controller."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    # proc(5): "hierarchy:controllers:path"; v2 has no controllers. cgroups(7)
    paths = {kind: path for _, kind, path in (line.split(":", 2) for line in groups)}
    for line in mounts:
        before, _, after = line.partition(" - ")
        mounted_root, mount_point = before.split()[3:5]
        kind, _, options = [*after.split(), "", ""][:3]
        path = None
        if kind == "cgroup2":
            path = paths.get("")
        elif kind == "cgroup" and "cpu" in options.split(","):
            path = next((p for names, p in paths.items() if "cpu" in names.split(",")), None)
        if path is not None:
            yield from _upwards(root / mount_point.lstrip("/"), mounted_root, path)


def _upwards(mount: Path, mounted_root: str, path: str) -> Iterator[Path]:
    # In a container the mount may show only a part of the hierarchy: its root is then cut off the path.
    inner = PurePosixPath(path)
    if inner.is_relative_to(mounted_root):
        inner = PurePosixPath("/") / inner.relative_to(mounted_root)
    for part in (inner, *inner.parents):
        yield mount / str(part).lstrip("/")


class ThreadChoice:
    """Chooses the thread count of each step from how long earlier steps took.

    Compiled steps meet at barriers, so when another process takes one of N cores, N threads can be slower
    than one. Each kind of step (a key) mostly runs with its best known count; now and then one step tries
    another count. What such trials lose is paid from a budget of `BUDGET` of all time spent, so they cost
    next to nothing where the machine is quiet; a count that lately was clearly faster is tried at once, and
    taken when it is clearly faster twice.
    """

    BUDGET = 0.005
    CLEARLY = 0.9

    def __init__(self, most: int) -> None:
        self.counts = tuple(dict.fromkeys(count for count in (most, most - 1, most // 2, 1) if count >= 1))
        self._kinds: dict[Hashable, _Kind] = {}

    def pick(self, key: Hashable) -> int:
        """Return the thread count for the next step of this kind; follow it with `report`."""
        if len(self.counts) == 1:
            return self.counts[0]
        kind = self._kinds.setdefault(key, _Kind(self.counts))
        return kind.trial() or kind.current

    def report(self, key: Hashable, count: int, seconds: float) -> None:
        """Say how long the step that `pick` was asked for took."""
        if len(self.counts) > 1:
            self._kinds[key].add(count, seconds)


class _Kind:
    """What is known about one kind of step."""

    _WARM = 4  # steps before the first trial: the first ones read weights from disk
    _RECENT = 5

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.current = counts[0]
        self._waiting = deque(counts[1:])  # the other counts, the next to try first
        self._times: dict[int, deque[float]] = {count: deque(maxlen=self._RECENT) for count in counts}
        self._budget = 0.0
        self._steps = 0
        self._rested = True  # whether the current count was measured since the last trial
        self._wins = 0

    def trial(self) -> int | None:
        """Return the count to try now, if one is due."""
        if self._steps < self._WARM or not self._rested:
            return None
        normal = statistics.median(self._times[self.current])
        for count in tuple(self._waiting):
            known = self._times[count]
            # Without experience, expect the worst: that all the work is divided among the threads.
            expected = known[-1] if known else normal * max(1.0, self.current / count)
            first_look = not known and expected <= 2 * normal
            loss = max(expected - normal, 0.05 * normal)
            if first_look or expected < ThreadChoice.CLEARLY * normal or self._budget >= loss:
                return count
        return None

    def add(self, count: int, seconds: float) -> None:
        """Learn from one step."""
        self._steps += 1
        self._times[count].append(seconds)
        if count == self.current:
            self._budget += ThreadChoice.BUDGET * seconds
            self._rested = True
            return
        self._rested = False
        normal = statistics.median(self._times[self.current])
        self._budget = max(0.0, self._budget - max(seconds - normal, 0.05 * normal))
        if seconds >= ThreadChoice.CLEARLY * normal:
            self._wins = 0
            self._waiting.rotate(-1)
            return
        self._wins += 1
        if self._wins == 2:
            self._waiting.remove(count)
            self._waiting.append(self.current)
            self._times[count] = deque([seconds], maxlen=self._RECENT)
            self.current, self._wins, self._budget, self._rested = count, 0, 0.0, True

"""How many CPUs this process may use, and how many it pays to use while others want them too."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from specqd.runtime.crowding import Crowding

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

    Compiled steps meet at barriers, so when another process takes one of N cores, N threads can be many
    times slower than one. Each kind of step (a key) mostly runs with its best known count; now and then one
    step tries another. What such trials lose is paid from a budget of `BUDGET` of all time spent, so they
    cost next to nothing where the machine is quiet. Free of charge is a first look, and trying what was
    clearly faster the last time. A neighbour comes and goes for all kinds: what one of them finds strikingly
    faster all take over, what it finds faster they try at once, and what it finds slow they expect to be slow.

    With `crowding`, a neighbour that takes CPU time from the steps is made room for at once, one that was there before
    from the first step on, and no more threads are tried until CPUs are idle again.
    """

    BUDGET = 0.005
    CLEARLY = 0.9  # of the normal time: faster than this in two trials is taken for faster
    STRIKINGLY = 0.6  # one trial is enough, for all kinds
    LOST = 0.3  # CPUs that others take from steps: a busy neighbour shares one and has half of it
    FREE = 0.8  # of a CPU that others leave, for each thread more
    SUDDENLY = 2.0  # times the normal time: two of three steps that took longer tell of a neighbour

    def __init__(self, most: int, crowding: Crowding | None = None) -> None:
        self._crowding = crowding
        self._left = 0  # threads before the latest neighbour was made room for
        self.counts = tuple(dict.fromkeys(count for count in (most, most - 1, most // 2, 1) if count >= 1))
        self._kinds: dict[Hashable, _Kind] = {}
        self._latest = most  # what was switched to last
        self._budget = 0.0  # seconds that trials may lose
        self._step = self._slow_step = 0  # counts steps; the latest that took suddenly longer
        self._slowness: dict[
            int, float
        ] = {}  # of a count when it was last compared: its time over the other's

    def pick(self, key: Hashable) -> int:
        """Return the thread count for the next step of this kind; follow it with `report`."""
        if len(self.counts) == 1:
            return self.counts[0]
        if not self._kinds and self._crowding and self._crowding.others() > self.LOST:
            self._give_way(self.counts[0])
        if key not in self._kinds:
            self._kinds[key] = _Kind(self.counts, self._latest)
        kind = self._kinds[key]
        if self._crowding:
            self._crowding.begin()
            if self._left and self._free(kind.current, self._left):
                for other in self._kinds.values():
                    other.hint = self._left
                self._left = 0
        trial = kind.trial(self._budget, self._slowness)
        if trial is None or (trial > kind.current and not self._free(kind.current, trial)):
            return kind.current
        return trial

    def report(self, key: Hashable, count: int, seconds: float) -> None:
        """Say how long the step that `pick` was asked for took."""
        if len(self.counts) == 1:
            return
        kind = self._kinds[key]
        lost = self._crowding.lost(count, seconds) if self._crowding else 0.0
        if lost > self.LOST and count > 1 and kind.begun:
            self._give_way(count)
            return
        if count == kind.current:
            if seconds > self.SUDDENLY * kind.normal and kind.known:
                self._notice(kind, seconds / kind.normal)
            self._step += 1
            kind.learn(seconds)
            self._budget += self.BUDGET * seconds
            return
        before, normal = kind.current, kind.normal
        self._budget = max(0.0, self._budget - max(seconds - normal, 0.05 * normal))
        self._slowness[count] = seconds / normal
        if kind.compare(count, seconds):
            self._latest, self._slowness[before] = count, normal / seconds
            for other in self._kinds.values():
                if seconds <= self.STRIKINGLY * normal:
                    other.switch(count)
                else:
                    other.hint = count

    def _free(self, now: int, then: int) -> bool:
        """Whether CPUs are left for more threads than now."""
        return self._crowding is None or self._crowding.left() >= now + self.FREE * (then - now)

    def _give_way(self, count: int) -> None:
        """Let all kinds run on fewer threads than `count`."""
        fewer = next(other for other in self.counts if other < count)
        self._left, self._latest = count, fewer
        for kind in self._kinds.values():
            if kind.current >= count:
                kind.switch(fewer)

    def _notice(self, kind: _Kind, slower: float) -> None:
        """Take note of a step that took longer than normal; after a second one soon, all are expected to."""
        soon, self._slow_step = self._step - self._slow_step <= 2, self._step
        if soon:
            for other in self._kinds.values():
                if other.current == kind.current:
                    other.scale(slower)


class _Kind:
    """What is known about one kind of step."""

    _WARM = 3  # steps before the first trial: the first one may read weights from disk
    _RECENT = 3
    _MOST_LOSS = 2.5  # times the normal step: how bad a count is expected to be still, after some time

    def __init__(self, counts: tuple[int, ...], start: int) -> None:
        self.current = start
        self.hint: int | None = None  # a count to try at once
        self._waiting = deque(count for count in counts if count != start)  # the next to try first
        self._times: dict[int, deque[float]] = {count: deque(maxlen=self._RECENT) for count in counts}
        self._steps = 0
        self._wins = 0
        self.normal = 0.0  # seconds that a step takes with the current count

    @property
    def begun(self) -> bool:
        """Whether a step was taken: the first one may wait for the disk, which looks like a neighbour."""
        return self._steps > 0

    @property
    def known(self) -> bool:
        """Whether enough steps were taken to know what is normal."""
        return self._steps >= self._WARM

    def trial(self, budget: float, slowness: Mapping[int, float]) -> int | None:
        """Return the count to try now, if one is due."""
        if not self.known:
            return None
        if self.hint not in {None, self.current}:
            return self.hint
        return next((count for count in self._waiting if self._worth_a_trial(count, budget, slowness)), None)

    def _worth_a_trial(self, count: int, budget: float, slowness: Mapping[int, float]) -> bool:
        known, normal = self._times[count], self.normal
        if known or count in slowness:
            slow = known[-1] / normal if known else slowness[count]
            expected = min(slow, self._MOST_LOSS) * normal
            free = slow < ThreadChoice.CLEARLY
        else:
            # Without experience, expect the worst: that all the work is divided among the threads.
            expected = normal * max(1.0, self.current / count)
            free = expected <= 2 * normal
        return free or budget >= max(expected - normal, 0.05 * normal)

    def learn(self, seconds: float) -> None:
        """Take the time of a step with the current count."""
        self._steps += 1
        self._times[self.current].append(seconds)
        self.normal = _median(self._times[self.current])

    def scale(self, factor: float) -> None:
        """Take steps with the current count to last so many times as long from now on."""
        times = self._times[self.current]
        self._times[self.current] = deque((factor * seconds for seconds in times), maxlen=self._RECENT)
        self.normal *= factor

    def compare(self, count: int, seconds: float) -> bool:
        """Take the time of a step with another count; switch to it if it is better for certain, and say so."""
        self._times[count].append(seconds)
        self.hint = None
        if seconds >= ThreadChoice.CLEARLY * self.normal:
            self._wins = 0
            self._waiting.rotate(-1)
            return False
        self._wins += 1
        if self._wins < 2 and seconds > ThreadChoice.STRIKINGLY * self.normal:
            return False
        self._switch(count)
        self._times[count].append(seconds)
        self.normal = seconds
        return True

    def switch(self, count: int) -> None:
        """Take a count over, unless it is the current one."""
        if count != self.current:
            self._switch(count)
            self._steps = 0  # nothing is known of it here

    def _switch(self, count: int) -> None:
        self._waiting.remove(count)
        self._waiting.append(self.current)
        for old in (self.current, count):
            self._times[old].clear()
        self.current, self.hint, self._wins = count, None, 0


def _median(times: Collection[float]) -> float:
    """The middle one, of two the larger. The statistics module takes ten times as long, at every step."""
    return sorted(times)[len(times) // 2]

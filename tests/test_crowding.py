"""Threads give way to a neighbour by the CPU time that it takes, and come back when CPUs are idle."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from specqd.runtime import crowding
from specqd.runtime.crowding import Crowding
from specqd.runtime.threads import ThreadChoice

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """Two CPUs whose time passes as told."""

    def __init__(self, stat: Path) -> None:
        self.now = self.used = 1.0
        self.idle = [100.0, 100.0]
        self.stat = stat
        self.write()

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.used

    def write(self) -> None:
        of_cpus = (f"cpu{i} 5 0 7 {int(idle * TICKS)} 3 0 0 0 0 0" for i, idle in enumerate(self.idle))
        self.stat.write_text("\n".join(["cpu 10 0 14 99 6", *of_cpus, "intr 1 2 3"]) + "\n")

    def run(self, seconds: float, used: float, idle: tuple[float, float] = (0.0, 0.0)) -> None:
        self.now += seconds
        self.used += used
        self.idle = [before + more for before, more in zip(self.idle, idle, strict=True)]
        self.write()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path / "stat")
    clock = SimpleNamespace(perf_counter=made.perf_counter, process_time=made.process_time)
    monkeypatch.setattr(crowding, "time", clock)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    return made


def step(choice: ThreadChoice, machine: Machine, others: float = 0.0) -> int:
    """Run a step of 10 ms of which others have so many CPUs, by the counts that the choice makes."""
    count = choice.pick("step")
    taken = 0.01 * 2 / count
    share = min(count, 2 - others)
    machine.run(taken, taken * share, (0.0, taken * (2 - share - others)))
    choice.report("step", count, taken)
    return count


def test_what_steps_lack_others_had(machine: Machine) -> None:
    crowd = Crowding(machine.stat)
    crowd.begin()
    machine.run(0.004, 0.006)
    assert crowd.lost(2, 0.004) == 0.0  # too short to tell
    crowd.begin()
    machine.run(0.006, 0.009)
    assert crowd.lost(2, 0.006) == pytest.approx(0.5)
    crowd.begin()
    machine.run(0.006, 0.012)
    assert crowd.lost(2, 0.006) == pytest.approx(0.0)


def test_what_nobody_used_of_the_own_cpus_is_left(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowding(machine.stat)
    assert crowd.left() == 0.0  # nothing is known yet
    machine.run(0.4, 0.0, (0.2, 0.4))
    assert crowd.left() == pytest.approx(1.5)
    machine.run(0.05, 0.0)
    assert crowd.left() == pytest.approx(1.5)  # read a moment ago
    machine.run(5.0, 0.0, (5.0, 5.0))
    assert crowd.left() == 0.0  # who knows when
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    crowd = Crowding(machine.stat)
    crowd.left()
    machine.run(0.4, 0.0, (0.4, 0.2))
    assert crowd.left() == pytest.approx(0.5)


def test_without_the_kernels_word_all_is_idle(machine: Machine) -> None:
    crowd = Crowding(machine.stat.parent / "nothing")
    machine.run(1.0, 0.0)
    assert crowd.left() == math.inf


def test_a_neighbour_is_made_room_for_at_once_and_left_alone(machine: Machine) -> None:
    choice = ThreadChoice(2, Crowding(machine.stat))
    counts = [step(choice, machine) for _ in range(20)]
    assert counts.count(1) <= 2  # a look at whether one is enough
    counts = [step(choice, machine, others=0.5) for _ in range(3)]
    assert counts[:2] == [2, 1] or counts == [2, 2, 1]
    # While one thread runs, the neighbour has the other CPU to itself: no trial of two.
    assert {step(choice, machine, others=1.0) for _ in range(300)} == {1}


def test_a_neighbour_that_was_there_before_has_its_place_from_the_first_step_on(machine: Machine) -> None:
    choice = ThreadChoice(2, Crowding(machine.stat))
    machine.run(0.3, 0.3, (0.0, 0.0))  # loading takes one of two CPUs, a neighbour the other
    assert {step(choice, machine, others=1.0) for _ in range(300)} == {1}
    assert [step(choice, machine) for _ in range(100)][-20:].count(2) >= 18


@pytest.mark.parametrize("seconds", [0.3, 0.01])
def test_without_a_neighbour_all_threads_begin(machine: Machine, seconds: float) -> None:
    """Also if loading was too quick to tell."""
    crowd = Crowding(machine.stat)
    machine.run(seconds, seconds / 2, (seconds, 0.4 * seconds))
    assert ThreadChoice(2, crowd).pick("step") == 2


def test_a_cpu_that_waits_for_a_disk_is_idle(machine: Machine) -> None:
    crowd = Crowding(machine.stat)
    machine.now += 100
    machine.used += 1
    waited = machine.stat.read_text().replace(" 3 0 0 0 0 0", f" {3 + 99 * TICKS} 0 0 0 0 0")
    machine.stat.write_text(waited)
    assert crowd.others() == pytest.approx(0.01)


def test_a_cpu_that_this_process_leaves_idle_itself_is_not_free_for_more_threads(machine: Machine) -> None:
    choice = ThreadChoice(2, Crowding(machine.stat))
    for others in [0.0] * 20 + [0.5] * 3 + [1.0] * 50:
        step(choice, machine, others)
    machine.run(0.3, 0.0, (0.3, 0.0))  # between two answers, with the neighbour still there
    assert {step(choice, machine, others=1.0) for _ in range(100)} == {1}


def test_threads_come_back_when_the_neighbour_has_gone(machine: Machine) -> None:
    choice = ThreadChoice(2, Crowding(machine.stat))
    for others in [0.0] * 20 + [0.5] * 3 + [1.0] * 50:
        step(choice, machine, others)
    counts = [step(choice, machine) for _ in range(40)]
    assert counts[0] == 1
    assert counts[-20:].count(1) <= 2  # a look at whether one is enough

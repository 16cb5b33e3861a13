"""CPU counting from affinity and quotas, and the choice of a thread count against a simulated machine."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from specqd.errors import ArtifactError
from specqd.runtime import threads
from specqd.runtime.cpu import cpu_features, demand_cpu
from specqd.runtime.threads import ThreadChoice, available_cpus, cgroup_quota


def machine(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "33 32 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2.0),
        ({"sys/fs/cgroup/a/b/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 0.5),
        ({"sys/fs/cgroup/a/b/cpu.max": "nonsense\n"}, None),
    ],
)
def test_quota_of_version_2(tmp_path: Path, files: dict[str, str], quota: float | None):
    assert cgroup_quota(machine(tmp_path, "0::/a/b\n", V2, files)) == quota


@pytest.mark.parametrize(("mounted", "inside"), [("/", "docker/x/"), ("/docker/x", "")])
def test_quota_of_version_1_also_where_a_container_sees_a_part(tmp_path: Path, mounted: str, inside: str):
    folder = f"sys/fs/cgroup/cpu,cpuacct/{inside}"
    files = {f"{folder}cpu.cfs_quota_us": "250000\n", f"{folder}cpu.cfs_period_us": "100000\n"}
    groups = "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n"
    assert cgroup_quota(machine(tmp_path, groups, V1.format(root=mounted), files)) == 2.5


def test_no_quota_of_version_1(tmp_path: Path):
    folder = "sys/fs/cgroup/cpu,cpuacct/"
    files = {f"{folder}cpu.cfs_quota_us": "-1\n", f"{folder}cpu.cfs_period_us": "100000\n"}
    assert cgroup_quota(machine(tmp_path, "5:cpu,cpuacct:/\n", V1.format(root="/"), files)) is None


def test_a_system_without_proc_has_no_quota(tmp_path: Path):
    assert cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "cpus"), [(None, 4), (2.5, 2), (0.5, 1), (9.0, 4)])
def test_affinity_and_quota_limit_together(monkeypatch, quota: float | None, cpus: int):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "cgroup_quota", lambda: quota)
    assert available_cpus() == cpus


def simulate(
    choice: ThreadChoice, steps: int, seconds: Callable[[int, int], float]
) -> list[tuple[int, float]]:
    """Run steps on a machine where step i with n threads takes seconds(i, n)."""
    ran = []
    for i in range(steps):
        count = choice.pick("step")
        ran.append((count, seconds(i, count)))
        choice.report("step", *ran[-1])
    return ran


def test_on_a_quiet_machine_trials_cost_under_one_percent():
    ran = simulate(ThreadChoice(2), 3000, lambda i, n: 0.014 * 2 / n)
    assert sum(seconds for _, seconds in ran) < 1.01 * 3000 * 0.014
    assert sum(count == 1 for count, _ in ran) >= 3


def test_a_busy_neighbour_from_the_start_is_noticed_within_ten_steps():
    ran = simulate(ThreadChoice(2), 300, lambda i, n: {2: 0.050, 1: 0.028}[n])
    assert all(count == 1 for count, _ in ran[10:12])
    assert sum(seconds for _, seconds in ran) < 1.05 * 300 * 0.028


def test_a_neighbour_that_comes_and_goes():
    def seconds(i: int, n: int) -> float:
        return {2: 0.050 if 200 <= i < 500 else 0.014, 1: 0.028}[n]

    ran = simulate(ThreadChoice(2), 1500, seconds)
    counts = [count for count, _ in ran]
    assert counts[150:200].count(2) >= 49
    assert counts[215:500].count(1) >= 280
    assert counts[1000:].count(2) >= 490


def test_single_hiccups_do_not_switch():
    ran = simulate(ThreadChoice(2), 1000, lambda i, n: 0.5 if i % 50 == 49 else 0.028 / n)
    assert [count for count, _ in ran].count(2) > 950


def test_the_other_count_may_be_one_less_on_larger_machines():
    ran = simulate(ThreadChoice(8), 2000, lambda i, n: 0.09 if n == 8 else 0.08 / n)
    assert [count for count, _ in ran[50:]].count(7) > 1800


def test_what_one_kind_of_step_learns_another_tries_at_once():
    choice = ThreadChoice(2)
    slow = {2: 0.2, 1: 0.02}
    for i in range(40):
        for key in ("draft", "verify"):
            count = choice.pick(key)
            choice.report(key, count, 0.01 if i < 20 and count == 2 else slow[count])
    late = choice.pick("prefill")
    assert (choice.pick("draft"), choice.pick("verify"), late) == (1, 1, 1)


def test_a_neighbour_that_costs_tenfold_is_left_within_six_steps_and_found_gone_again():
    def seconds(i: int, n: int) -> float:
        return {2: 0.200 if 100 <= i < 400 else 0.014, 1: 0.028}[n]

    counts = [count for count, _ in simulate(ThreadChoice(2), 1500, seconds)]
    assert counts[100:400].count(2) <= 6
    assert counts[1200:].count(2) >= 290


@pytest.mark.parametrize("from_the_start", [True, False])
def test_beside_a_neighbour_many_kinds_of_steps_cost_little_more_than_one(from_the_start: bool):
    """As when speculating: passes of any number of rows, most of them rare."""
    chance, choice = random.Random(1), ThreadChoice(2)
    kinds = [("target", rows) for rows in range(1, 17)] + [("draft", rows) for rows in range(1, 5)]
    spent, busy = [], range(0 if from_the_start else 500, 900)
    for i in range(2400):
        kind = chance.choice(kinds)
        seconds = {1: 0.010, 2: 0.060 if i in busy else 0.0075}
        count = choice.pick(kind)
        choice.report(kind, count, seconds[count])
        if i in busy:
            spent.append(seconds[count])
    # At the start each kind must be seen a few times before anything can be compared.
    assert sum(spent) < (1.15 if from_the_start else 1.10) * 0.010 * len(spent)
    assert [choice.pick(kind) for kind in kinds].count(2) >= len(kinds) - 2


def test_one_cpu_leaves_no_choice():
    assert {count for count, _ in simulate(ThreadChoice(1), 50, lambda i, n: 0.01)} == {1}


def cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nmodel name\t: Test CPU 9000\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: none\n"
    )
    return path


@pytest.fixture
def on_x86(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.mark.usefixtures("on_x86")
def test_features_are_compared_across_spellings(tmp_path: Path):
    path = cpuinfo(tmp_path, "avx2 avx512_bf16 sse4_2 pni abm")
    assert "avx512_bf16" in cpu_features(path)
    demand_cpu("x86_64-pc-linux-gnu", ["avx512bf16", "avx512_bf16", "sse4.2", "sse3", "lzcnt", "avx2"], path)


@pytest.mark.usefixtures("on_x86")
def test_a_missing_feature_is_named_with_the_cpu(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"avx512_vnni, which this one \(Test CPU 9000\) lacks"):
        demand_cpu("x86_64-unknown-linux-gnu", ["avx2", "avx512_vnni"], cpuinfo(tmp_path, "avx2"))


@pytest.mark.usefixtures("on_x86")
def test_another_architecture_and_an_unknown_one(tmp_path: Path):
    with pytest.raises(ArtifactError, match="compiled for aarch64 and this CPU is x86_64"):
        demand_cpu("arm64-apple-darwin", [])
    with pytest.raises(ArtifactError, match="does not say what its CPU has"):
        demand_cpu("x86_64", ["avx2"], tmp_path / "none")
    demand_cpu("x86_64", [], tmp_path / "none")

"""Tuning: the space of schedules, the search, the database, and what comes of it in artifacts."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn

import specqd
from specqd.artifact import open_artifact
from specqd.cli import main
from specqd.codegen.dense_kernels import (
    ConvSpec,
    GemmSpec,
    conv2d,
    gemm,
    pack_conv,
    pack_gemm,
    schedule_of,
    schedules,
)
from specqd.codegen.isa import named
from specqd.codegen.library import machine_code
from specqd.codegen.tune import tuned as tuned_module
from specqd.codegen.tune.database import Database
from specqd.codegen.tune.measure import Measuring
from specqd.codegen.tune.search import search
from specqd.errors import CodegenError, InputError
from specqd.frontends.dynamo import Options
from specqd.runtime.cpu import cpu_features, cpu_name

ISA = named("native", cpu_features())
SMALL = GemmSpec(12, 32, 48)
CONV = ConvSpec(1, 16, 33, 9, 48, (5, 5), padding=(2, 2, 2, 2))
WINOGRAD = dataclasses.replace(CONV, kernel=(3, 3), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("isa", [named("avx2"), named("avx512"), ISA], ids=lambda isa: isa.name)
@pytest.mark.parametrize("spec", [SMALL, CONV, WINOGRAD, dataclasses.replace(CONV, dtype="bfloat16")])
def test_the_first_schedule_is_the_usual_one_and_none_comes_twice(isa, spec):
    space = schedules(spec, isa)
    assert len(space) > 3 and len(set(space)) == len(space)
    write = conv2d if isinstance(spec, ConvSpec) else gemm
    assert write(spec, isa, "main", space[0]).script() == write(spec, isa, "main").script()
    assert all(schedule_of(spec, isa, dataclasses.asdict(schedule)) == schedule for schedule in space)
    assert schedule_of(spec, isa, {"blocks": 1000}) is None


def test_kernels_without_a_choice_have_no_schedules():
    assert schedules(GemmSpec(None, 32, 48), ISA) == []
    assert schedules(ConvSpec(1, 32, 9, 9, 32, (3, 3), groups=32), ISA) == []


@pytest.mark.parametrize("spec", [SMALL, CONV, WINOGRAD])
def test_any_schedule_computes_the_same_bits(spec, rng):
    """Of a handful that differ in every way; against float64 too."""
    made = np.random.default_rng(0)
    if isinstance(spec, ConvSpec):
        x, weight = made.standard_normal((1, 16, 33, 9)), made.standard_normal((48, 16, *spec.kernel))
        expected = torch.nn.functional.conv2d(torch.tensor(x), torch.tensor(weight), padding="same").numpy()
        given = (
            x.reshape(1, 1, 16, 33, 9).transpose(0, 1, 3, 4, 2),
            pack_conv(spec, weight.astype(np.float32)),
        )
        shape, write = (1, 3, 33, 9, 16), conv2d
    else:
        x, weight = made.standard_normal((12, 48)), made.standard_normal((32, 48))
        expected, shape, write = x @ weight.T, (12, 32), gemm
        given = x, pack_gemm(spec, weight.astype(np.float32))
    arrays = [tvm.runtime.tensor(np.ascontiguousarray(a, np.float32)) for a in given]
    space = schedules(spec, ISA)
    results = []
    for schedule in (space[0], *space[1 :: len(space) // 6]):
        out = tvm.runtime.tensor(np.zeros(shape, np.float32))
        machine_code(tvm.IRModule({"main": write(spec, ISA, "main", schedule)}), ISA).jit()["main"](
            *arrays, out
        )
        results.append(out.numpy())
    assert len(results) > 4
    assert all(np.array_equal(results[0], other) for other in results[1:])
    got = (
        results[0].transpose(0, 1, 4, 2, 3).reshape(expected.shape)
        if isinstance(spec, ConvSpec)
        else results[0]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def database(folder: Path) -> Database:
    return Database(folder / "tuned.jsonl", "a CPU", ISA)


def test_a_database_keeps_the_best_and_prefers_nothing_within_noise(tmp_path):
    space = schedules(SMALL, ISA)
    kept = database(tmp_path)
    assert kept.best(SMALL) is None and kept.schedule(SMALL) is None
    kept.record(SMALL, space[1], 0.98)
    assert kept.best(SMALL) is None and kept.measured(SMALL, space[1]) and not kept.measured(SMALL, space[2])
    kept.record(SMALL, space[2], 0.8)
    kept.record(SMALL, space[3], math.inf)
    again = database(tmp_path)
    assert (
        again.schedule(SMALL) == space[2]
        and again.best(SMALL).share == 0.8
        and again.measured(SMALL, space[3])
    )
    assert again.best(CONV) is None
    assert Database(tmp_path / "tuned.jsonl", "another CPU", ISA).best(SMALL) is None
    assert Database(tmp_path / "tuned.jsonl", "a CPU", named("avx2")).best(SMALL) is None
    other = Database(tmp_path / "other.jsonl", "a CPU", ISA)
    other.add([again.best(SMALL)])
    assert other.schedule(SMALL) == space[2] and not (tmp_path / "other.jsonl").exists()


def test_an_unfinished_line_is_passed_over_and_a_damaged_file_is_refused(tmp_path):
    kept = database(tmp_path)
    kept.record(SMALL, schedules(SMALL, ISA)[1], 0.5)
    file = tmp_path / "tuned.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:40])
    gone_on = database(tmp_path)
    assert gone_on.best(SMALL).share == 0.5
    for at, share in ((2, 0.4), (3, 0.3)):
        gone_on.record(SMALL, schedules(SMALL, ISA)[at], share)
    assert database(tmp_path).best(SMALL).share == 0.3 and len(file.read_text().splitlines()) == 3
    file.write_text("a letter, which has no newline")
    with pytest.raises(InputError, match="line 1 of"):
        database(tmp_path)
    file.write_text("nonsense\n" + whole)
    with pytest.raises(InputError, match=r"line 1 of .*tuned.jsonl is no tuned kernel"):
        database(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no database of tuned kernels"):
        database(tmp_path)


def test_the_search_goes_towards_the_best_and_takes_up_where_it_was(tmp_path):
    """By times that are made up: 80 words a pass and 2 rows a task are best."""
    asked = []

    def measure(spec, chosen):
        asked.append(spec)
        cost = [10 + abs(s.words - 80) + abs(s.task - 2) if hasattr(s, "words") else 10 for s in chosen]
        return np.array([cost, cost], float)

    space = schedules(SMALL, ISA)
    best = min((abs(s.words - 80) + abs(s.task - 2)) for s in space)
    kept = database(tmp_path)
    search({SMALL: 1}, ISA, kept, measure, 60, lambda *told: None)
    found = kept.schedule(SMALL)
    assert abs(found.words - 80) + abs(found.task - 2) == best
    assert all(kept.measured(SMALL, schedule) for schedule in space[1:])
    asked.clear()
    search({SMALL: 1}, ISA, database(tmp_path), measure, 60, lambda *told: None)
    assert asked == []


def test_what_is_quick_once_is_not_preferred(tmp_path):
    rng = np.random.default_rng(0)
    kept = database(tmp_path)
    noisy = lambda spec, chosen: rng.uniform(0.8, 1.2, (2, len(chosen)))  # noqa: E731
    search({SMALL: 1}, ISA, kept, noisy, 60, lambda *told: None)
    assert kept.best(SMALL) is None or kept.best(SMALL).share > 0.85


def test_a_kernel_that_cannot_be_measured_is_said(tmp_path):
    def measure(spec, chosen):
        return np.full((2, len(chosen)), math.inf)

    with pytest.raises(CodegenError, match="did not run where it was to be measured"):
        search({SMALL: 1}, ISA, database(tmp_path), measure, 1, lambda *told: None)


def timed(tracker: str | None) -> None:
    """Time two schedules in a process of its own, with which those that it starts end."""
    code = (
        "from specqd.codegen.dense_kernels import GemmSpec, schedules\n"
        "from specqd.codegen.isa import named\n"
        "from specqd.codegen.tune.measure import Measuring\n"
        "from specqd.runtime.cpu import cpu_features\n"
        "isa, spec = named('native', cpu_features()), GemmSpec(12, 32, 48)\n"
        f"with Measuring(isa, {tracker!r}) as measure:\n"
        "    print(measure(spec, schedules(spec, isa)[:2]).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    seconds = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert seconds.shape == (2, 2) and (seconds > 1e-7).all() and (seconds < 1).all()


def test_kernels_are_built_and_timed():
    timed(None)


@pytest.mark.extended
def test_a_tracker_lends_machines():
    pytest.importorskip("tornado", reason="TVM's RPC tracker is written with tornado")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    serve = ["--tracker", f"127.0.0.1:{port}", "--key", "mine", "--host", "127.0.0.1"]
    started = []
    try:
        for command in (["tvm.exec.rpc_tracker", *place], ["tvm.exec.rpc_server", *serve]):
            started.append(subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL))
            time.sleep(8)
        timed(f"127.0.0.1:{port}/mine")
    finally:
        for process in started:
            process.terminate()
            process.wait()


@pytest.mark.parametrize(
    ("tracker", "why"),
    [
        ("nowhere", "is no address: give HOST:PORT"),
        ("127.0.0.1:1/x", "no machine can be had at 127.0.0.1:1: start"),
    ],
)
def test_a_tracker_that_is_none_is_refused(tracker, why):
    with pytest.raises(InputError, match=why):
        Measuring(ISA, tracker)


class Known:
    """Measures nothing: the last schedule it is asked about takes half as long."""

    def __init__(self, isa, tracker):
        """Take what Measuring takes."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing was started."""

    def __call__(self, spec, chosen):
        usual = schedules(spec, ISA)[0]
        return np.array([[1.0 if schedule == usual else 0.5 for schedule in chosen]] * 2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()


def test_an_artifact_lists_its_schedules_and_others_learn_from_it(tmp_path, model, monkeypatch, capsys):
    x = torch.randn(1, 16, 20, 20)
    monkeypatch.setattr(tuned_module, "Measuring", Known)
    told = []
    made = specqd.compile(
        model,
        tmp_path / "a",
        example_inputs=(x,),
        tuning=specqd.Tuning(1, database=tmp_path / "own.jsonl"),
        progress=lambda *of: told.append(of),
    )
    assert any(what.startswith("tuning 2 kernels") for what, _, _ in told)
    tuned = made.module.tuned
    assert len(tuned) == 2 and {t.share for t in tuned} == {0.5} and {t.cpu for t in tuned} == {cpu_name()}
    np.testing.assert_allclose(
        specqd.load(tmp_path / "a")(x.numpy()), model(x).detach(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path / "a")])
    assert not ended.value.code
    assert "50% of the usual time" in capsys.readouterr().out
    # Without another measurement: from the database, and from the artifact.
    monkeypatch.setattr(tuned_module, "Measuring", None)
    for name, tuning in (
        ("b", specqd.Tuning(0, database=tmp_path / "own.jsonl")),
        ("c", specqd.Tuning(0, database=tmp_path / "new.jsonl", known=tuned)),
    ):
        again = specqd.compile(model, tmp_path / name, example_inputs=(x,), tuning=tuning)
        assert again.module.tuned == tuned
        assert (tmp_path / name / "lib.so").read_bytes() == (tmp_path / "a" / "lib.so").read_bytes()
    plain = specqd.compile(model, tmp_path / "d", example_inputs=(x,))
    assert plain.module.tuned == ()
    assert (tmp_path / "d" / "lib.so").read_bytes() != (tmp_path / "a" / "lib.so").read_bytes()


def test_torch_compile_takes_what_was_measured(tmp_path, model, monkeypatch):
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned_module, "Measuring", Known)
    x = torch.randn(1, 16, 20, 20)
    for tune in ("full", "cached"):
        options = {"tune": tune, "minutes": 1, "fallback": "error", "cache_dir": str(tmp_path / tune)}
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend="specqd", options=options)(x), model(x))
        (made,) = (tmp_path / tune).iterdir()
        assert len(open_artifact(made).manifest.module.tuned) == 2
        torch._dynamo.reset()


@pytest.mark.parametrize("minutes", [-1, math.nan, 1e9])
def test_impossible_times_are_refused(minutes):
    with pytest.raises(InputError, match="give 0, which measures nothing, or more"):
        specqd.Tuning(minutes)
    with pytest.raises(InputError, match="give 0, which measures nothing, or more"):
        Options.of({"tune": "full", "minutes": minutes})


def test_options_that_are_for_tuning_alone_are_refused_without(tmp_path, capsys):
    for option in (["--tracker", "here:1"], ["--known", str(tmp_path)]):
        with pytest.raises(SystemExit):
            main(["compile", "model.onnx", "-o", str(tmp_path / "a"), *option])
        assert "add --tune full, or --tune cached" in capsys.readouterr().err

"""`specqd bench` of a module: its latency, in turns with that of other engines."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import specqd
from specqd.bench_module import _difference, _Engine, run_module
from specqd.cli import main
from specqd.errors import ArtifactError, InputError
from specqd.saving import save_exported


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with `net.pt2` and the artifact `net` that was compiled from it."""
    folder = tmp_path_factory.mktemp("benched")
    torch.manual_seed(0)
    program = specqd.capture(nn.Sequential(nn.Linear(8, 4), nn.Tanh()), (torch.zeros(3, 8),))
    save_exported(program, folder / "net.pt2")
    specqd.compile(folder / "net.pt2", folder / "net")
    return folder


def test_its_latency_alone(model, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", str(model / "net"), "--quick", "--json", "--threads", "1"])
    figures = json.loads(capsys.readouterr().out)
    assert not end.value.code and figures["inputs"] == ["float32 [3, 8]"]
    assert figures["ms"].keys() == {"specqd"} and figures["ms"]["specqd"] > 0
    assert figures["ratios"] == figures["differences"] == figures["left_out"] == {}


@pytest.mark.extended
def test_in_turns_with_the_others(model, capsys):
    figures = run_module(model / "net", against=model / "net.pt2", quick=True, threads=1)
    named = figures["ms"].keys() | figures["left_out"].keys()
    assert named == {"specqd", "eager", "inductor", "onnxruntime"}
    assert {"specqd", "eager"} <= figures["ms"].keys() and figures["ratios"]["eager"] > 0
    assert figures["differences"]["specqd"] < 1e-6
    with pytest.raises(SystemExit):
        main(["bench", str(model / "net"), "--quick", "--against", str(model / "net.pt2")])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_what_cannot_be_measured_is_refused(model, capsys):
    for against in (model / "net", model / "none.pt2"):
        with pytest.raises(InputError, match=r"is no \.pt2 file"):
            run_module(model / "net", against=against)
    with pytest.raises(SystemExit) as end:
        main(["bench", str(model / "net"), "--tokens", "9"])
    assert end.value.code == 2 and "is no language model" in capsys.readouterr().err
    with pytest.raises(InputError, match="no dynamic size 'batch'; it has none"):
        run_module(model / "net", sizes={"batch": 3})


@pytest.mark.parametrize(
    ("eager", "own", "apart"),
    [
        (([1.0, 2.0],), ([1.0, 2.25],), 0.25),
        (([1.0], [math.inf, math.nan]), ([1.5], [math.inf, math.nan]), 0.5),
        (([1.0], [2.0]), ([1.5], [math.nan]), math.nan),
        (([1.0, 1.0],), ([1.0],), math.inf),
        (([1.0], [2.0]), ([1.0],), math.inf),
        (([],), ([],), 0.0),
    ],
)
def test_no_difference_from_eager_torch_is_hidden(eager, own, apart, tmp_path):
    np.savez(tmp_path / "eager.npz", *eager)
    np.savez(tmp_path / "other.npz", *own)
    assert _difference(tmp_path, "other") == pytest.approx(apart, rel=0, abs=0, nan_ok=True)


def test_an_engine_that_has_ended_is_told(tmp_path):
    engine = _Engine("none of them", "model", tmp_path, 1)
    assert engine.fault
    engine._process.wait(60)
    with pytest.raises(ArtifactError, match="the process ended without a word"):
        engine.measure(0.1)
    engine.end()

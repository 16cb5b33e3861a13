"""`specqd bench` of a module: its latency, in turns with that of other engines."""

import json

import pytest
import torch
from torch import nn

import specqd
from specqd.bench_module import run_module
from specqd.cli import main
from specqd.errors import InputError
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

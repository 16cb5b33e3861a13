"""`specqd profile`: which kernels a run calls, what they are for, and what of the machine they get."""

import importlib.util
import json

import pytest
import torch
from torch import nn
from torch.export import Dim

import specqd
from specqd.cli import main
from specqd.errors import InputError
from specqd.peaks import Peaks
from specqd.profile import Profile, Row, profile


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, table):
        for block in self.blocks:
            x = block(x)
        return torch.softmax(x, -1) + table


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled") / "net"
    given, rows = (torch.zeros(100, 64), torch.zeros(64)), Dim("rows", max=500)
    specqd.compile(Net().eval(), folder, example_inputs=given, dynamic_shapes=({0: rows}, None))
    return folder


@pytest.fixture
def quick_peaks(monkeypatch):
    """What the machine gives takes seconds to measure."""
    monkeypatch.setattr("specqd.profile.measure_peaks", lambda isa, threads: Peaks(10.0, 100.0, threads))


def test_equal_kernels_of_layers_are_one_row_and_their_work_is_told(artifact, quick_peaks):
    found = profile(artifact, runs=3, threads=1, sizes={_dynamic(artifact): 100})
    of_linears = [row for row in found.rows if row.gflops is not None]
    assert {row.module for row in of_linears} == {"blocks.*.first", "blocks.*.second"}
    assert all(row.calls == 2 for row in of_linears)
    for row in of_linears:
        assert row.gflops * row.seconds * 1e9 == pytest.approx(2 * 2 * 100 * 64 * 64)
    assert [row.seconds for row in found.rows] == sorted((r.seconds for r in found.rows), reverse=True)
    assert found.run_seconds > 0 and {"_softmax.default"} <= {row.operator for row in found.rows}


def _dynamic(artifact):
    from specqd.artifact import open_artifact

    return next(iter(open_artifact(artifact).manifest.module.ranges))


def test_shares_are_of_what_was_measured():
    row = Row("linear", 1, 0.5, 25.0, 20.0, "mm", "head")
    (told,) = Profile((row,), 0.5, Peaks(10.0, 100.0, 2), "a CPU", "avx2").figures()["rows"]
    assert (told["peak_fraction"], told["bandwidth_fraction"]) == (0.25, 2.0)


def test_the_machine_is_measured(artifact):
    from specqd.artifact import open_artifact
    from specqd.peaks import measure_peaks
    from specqd.runtime.module import Module

    Module.open(artifact, 1)
    peaks = measure_peaks(open_artifact(artifact).manifest.isa, 1)
    assert 0.5 < peaks.gbps < 1000 and 0.5 < peaks.gflops < 1000


def test_the_table_fits_80_columns(artifact, quick_peaks, capsys):
    with pytest.raises(SystemExit) as end:
        main(["profile", str(artifact), "--runs", "2", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert not end.value.code and max(map(len, lines)) <= 80
    assert any(line.startswith("linear") and "blocks.*.first" in line for line in lines)


def test_figures_as_json_and_a_picture(artifact, quick_peaks, capsys, tmp_path):
    plot = ["--plot", str(tmp_path / "times.png")] if importlib.util.find_spec("matplotlib") else []
    with pytest.raises(SystemExit) as end:
        main(["profile", str(artifact), "--runs", "2", "--threads", "1", "--json", *plot])
    figures = json.loads(capsys.readouterr().out)
    assert not end.value.code and figures["peaks"]["gbps"] == 10.0
    assert all({"name", "calls", "seconds", "peak_fraction"} <= row.keys() for row in figures["rows"])
    assert not plot or (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


REFUSED = {
    "no run": ({"runs": 0}, "0 runs give no time"),
    "an unknown size": ({"sizes": {"height": 3}}, "no dynamic size 'height'; it has s"),
    "a size out of range": ({"sizes": {"s": 501}}, "from 0 to 500, and not for 501"),
    "no rows": ({"sizes": {"s": 0}}, "is 0: give 1 or more"),
}


@pytest.mark.parametrize(("given", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused(artifact, quick_peaks, given, why):
    sizes = given.get("sizes")
    if sizes and "s" in sizes:
        given = {"sizes": {_dynamic(artifact): sizes["s"]}}
    with pytest.raises(InputError, match=why):
        profile(artifact, threads=1, **given)


def test_a_size_that_is_none_is_refused(artifact, capsys):
    with pytest.raises(SystemExit) as end:
        main(["profile", str(artifact), "--size", "many"])
    assert end.value.code == 2 and "write NAME=N" in capsys.readouterr().err

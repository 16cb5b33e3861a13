"""Programs as `.pt2` files: written, read back, compared, rewritten on the command line."""

import dataclasses

import pytest
import torch
from small_modules import calls, of
from small_programs import DIM, Decoder, logits
from small_programs import of as decoder
from torch import nn
from torch.export import Dim

import specqd
from specqd.cli import main
from specqd.errors import CaptureError, InputError
from specqd.graph_diff import Change, diff_programs
from specqd.passes import Pipeline
from specqd.program import ModelInfo
from specqd.saving import MODEL_INFO, save_exported


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.tied = self.head.weight

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(y), (y @ self.tied.T).softmax(-1)


def net():
    torch.manual_seed(0)
    return specqd.capture(Net(), (torch.randn(2, 3, 8, 8),), ({0: Dim("batch", max=7)},))


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_a_program_is_read_back_as_it_was(tmp_path, rng):
    program = net()
    save_exported(program, tmp_path / "net.pt2")
    again = specqd.capture(tmp_path / "net.pt2")
    assert diff_programs(program, again) == []
    assert (again.weights.keys(), again.model) == (program.weights.keys(), program.model)
    assert again.target.inputs == program.target.inputs
    x = torch.randn(5, 3, 8, 8, generator=rng)
    for got, expected in zip(again.module()(x), program.module()(x), strict=True):
        assert torch.equal(got, expected)
    (placeholder,) = again.target.graph.find_nodes(op="placeholder")
    size = placeholder.meta["val"].shape[0].node
    assert size.shape_env.var_to_range[size.expr].upper == 7


def test_a_file_of_torch_export_is_read_too(tmp_path, rng):
    x = torch.randn(2, 3, 8, 8, generator=rng)
    model = Net().eval()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "net.pt2")
    program = specqd.capture(str(tmp_path / "net.pt2"))
    assert program.model.family == "net"
    for got, expected in zip(program.module()(x), model(x), strict=True):
        assert torch.equal(got, expected)


def test_a_language_model_stays_one(tmp_path, rng):
    program = decoder(Decoder(lambda m, x, _: m.w * x, w=torch.randn(DIM, generator=rng)))
    program.model = ModelInfo("toy", 13, 64, (7, 8), 0, "somewhere")
    save_exported(program, tmp_path / "toy.pt2")
    again = specqd.capture(tmp_path / "toy.pt2")
    assert again.target.of_language_model and again.model == program.model
    assert torch.equal(logits(again), logits(program))


def test_what_cannot_be_written_or_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in \.pt2"):
        save_exported(net(), tmp_path / "net.bin")
    cached = dataclasses.replace(net().target)
    program = net()
    with cached.graph.inserting_before(next(iter(cached.graph.nodes))):
        cached.graph.placeholder("kv_k")
    program.entries["target"] = cached
    with pytest.raises(InputError, match="has a cache"):
        save_exported(program, tmp_path / "net.pt2")
    with pytest.raises(InputError, match="there is no file"):
        specqd.capture(tmp_path / "none.pt2")
    for content in (b"", b"PK\x03\x04 and nothing", b"text"):
        (tmp_path / "bad.pt2").write_bytes(content)
        with pytest.raises(CaptureError, match=r"bad\.pt2 cannot be read as what torch\.export\.save writes"):
            specqd.capture(tmp_path / "bad.pt2")
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(exported, tmp_path / "bad.pt2", extra_files={MODEL_INFO: '{"colour": "red"}'})
    with pytest.raises(CaptureError, match=r"bad\.pt2 cannot be read .*colour"):
        specqd.capture(tmp_path / "bad.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt2"]


def test_differences_are_told_by_operator_argument_and_weight():
    x, w = torch.ones(2, 3), torch.arange(3.0)
    one = of(lambda m, x: torch.relu(x * m.w) + 1.0, x, w=w)
    other = of(lambda m, x: torch.tanh(x * m.w) + 2.0, x, w=w + 1)
    changes = diff_programs(one, other)
    signs = [(c.sign, c.what) for c in changes]
    assert signs[:4] == [
        ("-", "relu = relu(mul)"),
        ("-", "add = add(relu, 1.0)"),
        ("+", "tanh = tanh(mul)"),
        ("+", "add = add(tanh, 2.0)"),
    ]
    assert changes[4:] == [Change("~", "", "weight w float32 [3]", "the same, 100.0% of its elements new")]
    swapped = of(lambda m, x: m.w - x, x, w=w), of(lambda m, x: x - m.w, x, w=w)
    assert [c.sign for c in diff_programs(*swapped)] == ["~"]
    assert diff_programs(one, one.copy()) == []


def test_inputs_of_another_kind_are_told():
    one, other = (of(lambda m, x: torch.relu(x), x) for x in (torch.ones(2, 3), torch.ones(2, 3).double()))
    (name,) = (given.name for given in one.target.inputs)
    became = Change("~", "", f"input {name} float32 [2, 3]", f"input {name} float64 [2, 3]")
    assert diff_programs(one, other) == [became]
    open_size = of(lambda m, x: torch.relu(x), torch.ones(2, 3), dynamic=({0: Dim("b", max=9)},))
    assert [c.became for c in diff_programs(one, open_size)] == [f"input {name} float32 [?, 3]"]


def test_weights_that_come_go_and_change_their_kind_are_told():
    x = torch.ones(2, 3)
    one = of(lambda m, x: x + m.a + m.b.float(), x, a=torch.ones(3), b=torch.ones(3))
    other = of(lambda m, x: x + m.c + m.b.float(), x, c=torch.ones(3), b=torch.ones(3).half())
    found = [
        (c.sign, c.what) for c in diff_programs(one, other) if c.what.startswith("weight") and not c.module
    ]
    assert ("-", "weight a float32 [3]") in found and ("+", "weight c float32 [3]") in found
    assert ("~", "weight b float32 [3]") in found


def test_the_command_line_rewrites_and_compares(tmp_path, capsys):
    before, after = tmp_path / "before.pt2", tmp_path / "after.pt2"
    save_exported(net(), before)
    code, out, _ = run(capsys, "rewrite", before, "fold-batch-norm, fold-constants", "-o", after)
    assert (
        code == 0 and "fold-batch-norm on target: 1 rewrites, 0 refusals" in out and f"wrote {after}" in out
    )
    expected = Pipeline.parse("fold-batch-norm, fold-constants")(net())
    assert calls(specqd.capture(after)) == calls(expected)
    code, out, _ = run(capsys, "diff", before, after)
    assert code == 1 and "@@ norm" in out and "\n- batch_norm = batch_norm(" in out
    assert max(map(len, out.splitlines())) <= 80
    assert run(capsys, "diff", before, before)[:2] == (0, "they compute the same in the same way\n")
    assert run(capsys, "diff", "-q", before, after)[:2][0] == 1
    code, _, err = run(capsys, "rewrite", before, "fold-constants", "-o", after)
    assert code == 2 and "is there already" in err
    assert run(capsys, "diff", before, tmp_path / "none.pt2")[0] == 2


def test_the_command_line_says_why_on_demand(tmp_path, capsys):
    save_exported(of(lambda m, x: (torch.exp(x), torch.exp(x)), torch.ones(2)), tmp_path / "two.pt2")
    _, out, _ = run(capsys, "rewrite", tmp_path / "two.pt2", "common-subexpressions")
    assert "1 nodes were left alone; --why says which and why" in out
    _, out, _ = run(capsys, "rewrite", tmp_path / "two.pt2", "common-subexpressions", "--why")
    assert "left exp_1 alone: it and exp, which is the same, are both outputs" in out

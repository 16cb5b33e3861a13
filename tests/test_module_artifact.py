"""Artifacts of modules: what they record, how they are called, and what they refuse."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import specqd
from specqd.cli import main
from specqd.errors import ArtifactError, InputError
from specqd.runtime.model import load as load_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))

    def forward(self, tokens, weights):
        x = self.head(self.embed(tokens)) * weights[..., None]
        return x.masked_fill(self.mask, 0) * self.scale[0], self.steps + tokens[..., :1]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def artifact(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("module") / "net"
    length = Dim("length", max=100)
    given = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5)
    manifest = specqd.compile(net, folder, example_inputs=given, dynamic_shapes=({1: length}, {1: length}))
    return folder, manifest


@pytest.fixture
def inputs(rng):
    return torch.randint(0, 10, (2, 7), generator=rng), torch.rand(2, 7, generator=rng)


def test_it_records_what_it_takes_and_gives(artifact):
    record = artifact[1].module
    tokens, weights = record.inputs
    assert (tokens.name, tokens.dtype, tokens.shape[0]) == ("tokens", "int64", 2)
    assert tokens.shape[1] == weights.shape[1] != 5
    assert [(t.dtype, t.shape) for t in record.outputs] == [("float32", (2, None, 3)), ("int64", (2, 3))]


def test_arrays_give_arrays_and_tensors_tensors(artifact, net, inputs):
    compiled, wanted = specqd.load(artifact[0]), net(*inputs)
    for given, kind in ((inputs, torch.Tensor), ([x.numpy() for x in inputs], np.ndarray)):
        for got, want in zip(compiled(*given), wanted, strict=True):
            assert isinstance(got, kind)
            np.testing.assert_allclose(got, want.detach(), rtol=1e-5, atol=1e-6)


def test_it_runs_without_torch_and_without_tvms_compiler(artifact, net, inputs, tmp_path):
    np.savez(tmp_path / "given.npz", *(x.numpy() for x in inputs))
    probe = (
        "import json, sys, numpy, specqd\n"
        f"given = numpy.load({str(tmp_path / 'given.npz')!r})\n"
        f"found = specqd.load({str(artifact[0])!r})(given['arr_0'], given['arr_1'])\n"
        "print(json.dumps([[x.tolist() for x in found], [m for m in ('torch', 'tvm') if m in sys.modules]]))"
    )
    found, loaded = json.loads(
        subprocess.check_output([sys.executable, "-c", probe], cwd=tmp_path, text=True)
    )
    assert loaded == []
    for got, want in zip(found, net(*inputs), strict=True):
        np.testing.assert_allclose(got, want.detach(), rtol=1e-5, atol=1e-6)


def test_any_layout_of_the_memory_will_do(artifact, net, inputs):
    compiled, (tokens, weights) = specqd.load(artifact[0]), inputs
    wanted = net(tokens, weights)[0].detach()
    strange = (
        weights.t().contiguous().t(),
        torch.stack([weights, weights], -1)[..., 0],
        weights.clone().requires_grad_(),
    )
    for given in strange:
        torch.testing.assert_close(compiled(tokens, given)[0], wanted)
    odd = np.frombuffer(b" " + weights.numpy().tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 7)
    frozen = weights.numpy().copy()
    frozen.flags.writeable = False
    for given in (odd, frozen, weights.numpy()[:, ::-1][:, ::-1]):
        np.testing.assert_allclose(compiled(tokens.numpy(), given)[0], wanted, rtol=1e-5, atol=1e-6)


def test_outputs_are_the_callers_own(artifact, inputs):
    compiled = specqd.load(artifact[0])
    first = compiled(*inputs)
    kept = [x.clone() for x in first]
    compiled(inputs[0], inputs[1] * 2)
    assert all(map(torch.equal, first, kept))


def test_empty_tensors_have_empty_results(artifact):
    found = specqd.load(artifact[0])(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))
    assert [tuple(x.shape) for x in found] == [(2, 1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, w: (t,), "was given 1 inputs and takes 2: tokens int64"),
        (lambda t, w: (t.int(), w), r"takes tokens int64 \[2, .*\], not int32 \[2, 7\]"),
        (lambda t, w: (t, w[0]), r"takes weights float32 .*, not float32 \[7\]"),
        (lambda t, w: (t[:1], w), r"takes tokens int64 .*, not int64 \[1, 7\]"),
        (lambda t, w: (t, w[:, :3]), "has 3 where .* has 7: sizes of one name must be the same"),
        (lambda t, w: (t.repeat(1, 20), w.repeat(1, 20)), "from 0 to 100, and not for 140"),
        (lambda t, w: (t + 10, w), "an index that is out of range"),
        (lambda t, w: (t.tolist(), w), "give an array, not list"),
        (lambda t, w: (t.numpy().astype(">i8"), w.numpy()), "not >i8"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(artifact, inputs, change, why):
    with pytest.raises(InputError, match=why):
        specqd.load(artifact[0])(*change(*inputs))


def test_inspect_says_what_it_takes_and_gives(artifact, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(artifact[0])])
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "takes      tokens int64 [2, " in out and "gives      output_1 int64 [2, 3]" in out


def test_options_of_language_models_are_refused(artifact):
    with pytest.raises(InputError, match="no language model, which alone has an option 'sequences'"):
        specqd.load(artifact[0], sequences=2)
    with pytest.raises(ArtifactError, match="no language model: load it with"):
        load_model(artifact[0])


def test_an_artifact_that_replaced_another_is_loaded_as_itself(tmp_path):
    class Add(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, x):
            return x + self.number

    loaded = []
    for number in (1, 2):
        specqd.compile(Add(number), tmp_path / "add", example_inputs=(torch.zeros(3),), force=True)
        loaded.append(specqd.load(tmp_path / "add"))
    assert [module(torch.zeros(3))[0].item() for module in loaded] == [1, 2]

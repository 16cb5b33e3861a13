"""torch.compile(backend="specqd"): graphs against eager torch, and what happens where one cannot be compiled."""

import warnings
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

import specqd
from specqd.build_module import DEFAULT_PIPELINE
from specqd.codegen.isa import named
from specqd.errors import InputError
from specqd.frontends.dynamo import Options, backend, compiled
from specqd.passes import Pipeline
from specqd.passes.prune.calibration_data import Data
from specqd.passes.quantize.cast_bf16 import CastBF16
from specqd.passes.quantize.quantize_int8 import QuantizeINT8
from specqd.runtime.cpu import cpu_features


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.norm(self.mix(self.embed(tokens).transpose(1, 2))).relu()
        return self.head(x.transpose(1, 2)), tokens.shape[1], tokens + tokens.shape[1]


@pytest.fixture
def net():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean += torch.randn(8)
    yield net.eval()
    torch._dynamo.reset()


def counted(**options):
    """The backend, with the number of graphs that it was given."""
    seen = []

    def count(graph, inputs, **given):
        seen.append(graph)
        return backend(graph, inputs, **given)

    return seen, {"backend": count, "options": {"fallback": "error", **options}}


def test_the_backend_is_found_by_its_name():
    assert "specqd" in torch._dynamo.list_backends()


@torch.no_grad()
def test_lengths_do_not_compile_again(net):
    seen, given = counted()
    compiled = torch.compile(net, dynamic=True, **given)
    compiled(torch.zeros(2, 7, dtype=torch.long))
    first = len(seen)
    for length in range(3, 23):
        tokens = torch.randint(0, 20, (2, length))
        for got, wanted in zip(compiled(tokens), net(tokens), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(seen) == first


@torch.no_grad()
def test_graph_breaks_and_changed_inputs_are_torchs_business(net):
    def function(x):
        y = x.relu()
        torch._dynamo.graph_break()
        x.add_(1)
        return y.sum() + x.mean(), y.view(-1)

    seen, given = counted()
    x, same = torch.randn(3, 4), None
    same = x.clone()
    for got, wanted in zip(torch.compile(function, **given)(x), function(same), strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(seen) == 2 and torch.equal(x, same)


@torch.no_grad()
def test_outputs_that_are_views_of_each_other_lie_as_in_eager_torch(net):
    def function(x):
        y = x.t() + 1
        return y, y[1:], y.t().reshape(-1)

    _, given = counted()
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        for got, wanted in zip(torch.compile(function, dynamic=True, **given)(x), function(x), strict=True):
            torch.testing.assert_close(got, wanted)
            assert got.stride() == wanted.stride()


@torch.no_grad()
def test_outputs_that_repeat_elements_repeat_them_in_memory(net):
    def function(x):
        return (x + 1)[:, None].expand(3, 5, 4), (x * 2).unfold(1, 2, 1)

    x = torch.randn(3, 4)
    _, given = counted()
    for got, wanted in zip(torch.compile(function, **given)(x), function(x), strict=True):
        torch.testing.assert_close(got, wanted)
        assert got.stride() == wanted.stride()


@torch.inference_mode()
def test_a_model_made_in_inference_mode():
    torch._dynamo.reset()
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    _, given = counted()
    torch.testing.assert_close(torch.compile(layer, **given)(x), layer(x))


@torch.no_grad()
def test_what_cannot_be_compiled_runs_in_eager_torch_and_says_so(net):
    def function(x):
        return torch.linalg.eigvalsh(x @ x.T)

    x = torch.randn(3, 3)
    with pytest.warns(UserWarning, match=r"eager torch.*eigh.*test_dynamo.py.*no rule for this operator"):
        found = torch.compile(function, backend="specqd")(x)
    torch.testing.assert_close(found, function(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no rule for this operator"):
        torch.compile(function, backend="specqd", options={"fallback": "error"})(x)


def test_training_is_refused(net):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"inference.*no_grad"):
        torch.compile(net, backend="specqd")(torch.zeros(1, 4, dtype=torch.long))


@torch.no_grad()
def test_explain_tells_the_graphs_and_what_is_refused_of_them(net):
    class Two(nn.Module):
        def forward(self, x):
            y = x.relu() + 1
            torch._dynamo.graph_break()
            return torch.linalg.eigvalsh(y)

    found = specqd.explain(Two(), torch.eye(3))
    assert [bool(graph.refused) for graph in found.graphs] == [False, True]
    assert "graph 0: 2 operators, is compiled" in str(found)
    assert "eigh" in found.graphs[1].refused[0] and "test_dynamo.py" in found.graphs[1].refused[0]
    assert len(found.breaks) == 1


@torch.no_grad()
def test_changed_weights_are_noticed(net):
    compiled = torch.compile(net, backend="specqd")
    tokens = torch.randint(0, 20, (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(tokens)
    net.head.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"weights were changed"):
        found = compiled(tokens)
    torch.testing.assert_close(found[0], net(tokens)[0])


@torch.no_grad()
def test_what_was_compiled_ahead_can_be_saved(net, tmp_path):
    compiled = torch.compile(net, backend="specqd", fullgraph=True, options={"fallback": "error"})
    example = torch.zeros(2, 7, dtype=torch.long)
    torch._dynamo.mark_dynamic(example, 1)
    for name in ("first", "again"):
        compiled.forward.aot_compile(((example,), {})).save_compiled_function(tmp_path / name)
        saved = _loaded(tmp_path / name)
        for length in (3, 9):
            tokens = torch.randint(0, 20, (2, length))
            for got, wanted in zip(saved(net, tokens), net(tokens), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        saved.save_compiled_function(tmp_path / name)
        assert torch.equal(_loaded(tmp_path / name)(net, tokens)[0], saved(net, tokens)[0])
        net.head.weight.mul_(2)
        with pytest.raises(InputError, match="the weights were changed"):
            saved(net, tokens)


@torch.no_grad()
def test_what_runs_in_eager_torch_can_be_saved(tmp_path):
    compiled = torch.compile(_largest_eigenvalue, backend="specqd", fullgraph=True)
    x = torch.randn(3, 3)
    with pytest.warns(UserWarning, match="eager torch"):
        compiled.aot_compile(((x,), {})).save_compiled_function(tmp_path / "saved")
    torch.testing.assert_close(_loaded(tmp_path / "saved")(x), _largest_eigenvalue(x))


def _largest_eigenvalue(x):
    return torch.linalg.eigvalsh(x @ x.T)[-1]


def _loaded(path):
    torch._dynamo.reset()
    with path.open("rb") as file:
        return torch.compiler.load_compiled_function(file)


@torch.no_grad()
def test_graphs_are_kept_for_the_next_process(net, tmp_path):
    tokens = torch.randint(0, 20, (2, 5))
    _, given = counted(cache_dir=str(tmp_path))
    torch.compile(net, **given)(tokens)
    (artifact,) = tmp_path.iterdir()
    written = (artifact / "lib.so").stat().st_mtime_ns
    torch._dynamo.reset()
    found = torch.compile(net, **given)(tokens)
    torch.testing.assert_close(found[0], net(tokens)[0], rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [artifact.name]
    assert (artifact / "lib.so").stat().st_mtime_ns == written


@torch.no_grad()
def test_graphs_are_kept_for_each_kind_of_cpu(monkeypatch, tmp_path):
    _, given = counted(cache_dir=str(tmp_path))
    all_of_them = cpu_features()
    few = frozenset(name for name in all_of_them if not name.startswith(("amx", "avx512")))
    for features in (all_of_them, few):
        torch._dynamo.reset()
        for user in ("specqd.frontends.dynamo", "specqd.build"):
            monkeypatch.setattr(f"{user}.cpu_features", lambda features=features: features)
        torch.compile(lambda x: x + 1, **given)(torch.zeros(3))
    kinds = {named("native", features).name for features in (all_of_them, few)}
    assert len(list(tmp_path.iterdir())) == len(kinds)


@torch.no_grad()
def test_graphs_are_kept_for_each_content_of_calibration_data(tmp_path):
    data, kept = tmp_path / "data", tmp_path / "kept"
    data.mkdir()
    pipeline = f"quantize-int8{{data={data},samples=1}}"
    _, given = counted(cache_dir=str(kept), precision="int8", pipeline=pipeline)
    layer = nn.Conv2d(3, 4, 1)
    for colour, graphs in (("red", 1), ("red", 1), ("blue", 2)):
        Image.new("RGB", (8, 8), colour).save(data / "only.png")
        torch._dynamo.reset()
        torch.compile(layer, **given)(torch.zeros(1, 3, 8, 8))
        assert len(list(kept.iterdir())) == graphs


@torch.no_grad()
def test_an_input_that_is_made_float32_is_rounded_as_any_other(rng):
    torch._dynamo.reset()
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=rng, dtype=torch.uint8)
    found = []

    def build(program, options):
        found.extend([QuantizeINT8(data=Data.of(images))(program), CastBF16()(program)])
        return program.module()

    layer = nn.Conv2d(3, 4, 1)
    backend = partial(compiled, chosen=Options(), build=build)
    torch.compile(lambda x: layer(x.float()), backend=backend)(images)
    torch._dynamo.reset()
    for result in found:
        assert (result.rewrites, result.refusals) == (1, ())
        (product,) = [n for n in result.program.target.graph.nodes if "conv2d" in str(n.target)]
        codes = product.args[0].args[0]
        assert "quantize_per_tensor" in str(codes.target) or codes.kwargs == {"dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"speed": 1}, "no option 'speed'; it has pipeline, precision, fallback, cache_dir, tune"),
        ({"precision": "fp8"}, "precision='fp8' is not to be had; there is 'exact', 'bf16', 'int8'"),
        ({"precision": "int8"}, "precision='int8' needs data to find scales on"),
        ({"fallback": "never"}, "fallback='never' is not to be had; there is 'eager', 'error'"),
    ],
)
def test_options_are_checked(options, why):
    with pytest.raises(InputError, match=why):
        Options.of(options)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_products_in_fewer_bits(precision, rng):
    torch._dynamo.reset()
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding=1),
        nn.Flatten(), nn.Linear(200, 40),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 12, 12, generator=rng)
    programs = []

    def build(program, options):
        steps = options.passes or DEFAULT_PIPELINE
        programs.append(Pipeline.parse(steps)(program))
        return programs[-1].module()

    def count(graph, inputs, **_):
        pipeline = "fold-batch-norm, quantize-int8{data=random,samples=4}" if precision == "int8" else None
        return compiled(graph, inputs, Options.of({"precision": precision, "pipeline": pipeline}), build)

    got = torch.compile(net, backend=count)(x)
    # Both round to 8 bits at least, in three layers.
    assert 0 < (got - net(x)).norm() < 0.05 * net(x).norm()
    assert sum(len(event.rewritten) for event in programs[0].history) == 1 + 3
    torch._dynamo.reset()

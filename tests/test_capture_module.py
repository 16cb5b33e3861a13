"""Any torch module as a Program: what is computed, what is stored, what is refused. The oracle is the module itself."""

import pytest
import torch
from small_programs import DIM, Decoder, of
from torch import fx, nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812

import specqd
from specqd.errors import CaptureError, InputError
from specqd.passes import Pipeline, registered
from specqd.passes.match import shapes
from specqd.passes.watchers import verify
from specqd.program import Entry, Input, ModelInfo, Program
from specqd.reference import example_values, run


class Net(nn.Module):
    """Two inputs of different dtypes, buffers, a shared weight, operators in place, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.embed = nn.Embedding(5, 8)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("offset", torch.tensor([3]), persistent=False)

    def forward(self, image, label, *, twice=False):
        x = F.relu(self.norm(self.conv(image)), inplace=True)
        x = F.dropout(self.depthwise(x), 0.5, self.training).mean((2, 3)).view(image.shape[0], -1)
        x = self.second(self.first(x)) + self.embed(label) * self.scale
        return {"x": x, "label": label + self.offset, "rest": [x.double() * (2 if twice else 1)]}


@pytest.fixture
def net(rng):
    net = Net()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3
    net.norm.running_mean += torch.randn(8, generator=rng)
    return net


@pytest.fixture
def given(rng):
    return torch.randn(2, 3, 9, 7, generator=rng), torch.tensor([1, 4])


def equal(got, wanted):
    wanted = (wanted["x"], wanted["label"], *wanted["rest"])
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_graph_computes_what_the_module_does_bit_for_bit(net, given):
    program = specqd.capture(net, given)
    wanted = net.eval()(*given)
    assert equal(run(program, program.target, *given), wanted)
    assert equal(program.module()(*given), wanted)


def test_the_module_stays_as_it_was(net, given):
    net.depthwise.eval()
    before, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    specqd.capture(net, given)
    assert [m.training for m in net.modules()] == before
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_weights_keep_their_names_and_are_held_once(net, given):
    program = specqd.capture(net, given)
    names = set(net.state_dict()) - {"norm.num_batches_tracked", "second.weight"} | {"offset"}
    assert set(program.weights) == names
    assert program.weights["first.weight"].data_ptr() == net.first.weight.data_ptr()
    again = Net()
    report = again.load_state_dict(program.module().state_dict(), strict=False)
    assert report.unexpected_keys == ["offset"]


def test_operators_are_not_decomposed(net, given):
    graph = specqd.capture(net, given).target.graph
    called = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert {"aten.conv2d.default", "aten.conv2d.padding", "aten.batch_norm.default", "aten.relu.default",
            "aten.linear.default", "aten.embedding.default"} <= set(called)  # fmt: skip
    assert not [name for name in called if name.startswith("aten.relu_") or "legit" in name]


def test_inputs_are_declared_and_dynamic_sizes_may_differ(net, given, rng):
    batch = Dim("batch", max=64)
    program = specqd.capture(net, given, ({0: batch}, {0: batch}))
    assert program.target.inputs == (
        Input("image", "float32", (2, 3, 9, 7), (0,)),
        Input("label", "int64", (2,), (0,)),
    )
    assert "takes image float32 [?, 3, 9, 7], label int64 [?]" in str(program)
    more = torch.randn(5, 3, 9, 7, generator=rng), torch.arange(5)
    assert equal(run(program, program.target, *more), net.eval()(*more))
    found = shapes(program, program.target)
    assert found[next(n for n in program.target.graph.nodes if n.name == "conv2d")] == (2, 8, 9, 7)


def test_plain_values_among_the_inputs_stay_what_they_were(net, given):
    program = specqd.capture(lambda_with(net, twice=True), given)
    x, _, rest = run(program, program.target, *given)
    assert torch.equal(rest, x.double() * 2)


def lambda_with(net, **options):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, image, label):
            return self.net(image, label, **options)

    return Wrapped()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_computes_in_its_own_dtype(dtype, rng):
    linear, x = nn.Linear(4, 3).to(dtype), torch.randn(2, 4, generator=rng).to(dtype)
    program = specqd.capture(linear, (x,))
    got = run(program, program.target, x)
    assert got.dtype == dtype and torch.equal(got, linear(x)) and torch.equal(program.module()(x), linear(x))


def test_a_module_is_made_of_a_language_model_too():
    program = Pipeline.parse("cast-mxfp4")(of(Decoder(lambda m, x, _: m.up(x), up=nn.Linear(DIM, DIM))))
    tokens, positions = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    assert torch.equal(program.module()(tokens, positions), run(program, program.target, tokens))


def test_a_weight_below_another_has_a_name_of_its_own(rng):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, generator=rng))

        def forward(self, x):
            return x @ self.w

    x = torch.randn(2, 3, generator=rng)
    program = specqd.capture(Tied(), (x,))
    node = next(iter(program.target.graph.find_nodes(op="get_attr")))
    with program.target.graph.inserting_after(node):
        below = program.target.graph.create_node("get_attr", "w.half")
    product = next(iter(node.users))
    with program.target.graph.inserting_after(product):
        total = program.target.graph.call_function(torch.ops.aten.matmul.default, (product, below))
    product.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    program.weights["w.half"] = program.weights["w"] / 2
    module = program.module()
    assert set(module.state_dict()) == {"w", "w_half"}
    assert torch.equal(module(x), run(program, program.target, x))


def test_the_module_is_exportable_again(net, given):
    module = specqd.capture(net, given).module()
    again = torch.export.export(module, given).module()
    assert equal(again(*given), net.eval()(*given))


def test_every_pass_leaves_it_alone_or_says_why(net, given):
    program = specqd.capture(net, given)
    wanted = net.eval()(*given)
    whole = {}
    for name, kind in registered().items():
        given_data = "data" in vars(kind())
        if kind.__module__.startswith("specqd.passes.") and "prune" not in kind.__module__ and not given_data:
            result = kind()(program)
            whole[name] = [r.why for r in result.refusals if r.node == "output"]
            if kind().lossless:
                got = run(result.program, result.program.target, *given)
                # Folding the batch norm rounds differently.
                torch.testing.assert_close(got[0], wanted["x"], rtol=1e-5, atol=1e-5)
    for name in ("insert-kv-cache", "derive-draft", "share-kv", "skip-layers", "trim-vocabulary", "refine-head",
                 "calibrate-mxfp4"):  # fmt: skip
        assert whole[name] == [
            f"{name} is for language models, and this takes image float32 [2, 3, 9, 7], label int64 [2]"
        ]


def test_options_of_language_models_are_refused_when_it_is_compiled(net, given, tmp_path):
    with pytest.raises(InputError, match="Net is no language model, which alone has the option 'context'"):
        specqd.compile(specqd.capture(net, given), tmp_path / "out", context=64, pipeline=None)


def test_verify_and_explain_take_it(net, given):
    program = specqd.capture(net, given)
    Pipeline.parse("fuse-linear")(program, verify(given))
    assert "conv2d" in str(specqd.explain(program, "fuse-linear"))


# Refusals


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x * self.count


class Overwriting(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Branching()

    def forward(self, x):
        return self.inner(x + 1)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Outer(), r"Outer cannot be turned into one graph: .* in inner \(Branching\), line \d+ of test_capture"),
        (Counting(), r"Counting changes count when it runs, .* give that as an output instead"),
        (Overwriting(), r"Overwriting changes x when it runs"),
        (nn.Linear(4, 4, device="meta"), r"the weight weight is on meta; move the module to the CPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_named(module, why):
    with pytest.raises(CaptureError, match=why):
        specqd.capture(module, (torch.ones(2, 4),))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: specqd.capture(nn.ReLU(), torch.ones(3)), "example_inputs is a Tensor; give a tuple"),
        (lambda: specqd.capture(nn.ReLU(), None, {"x": None}), "dynamic_shapes needs example_inputs"),
        (lambda: specqd.capture("folder", (torch.ones(3),)), "belong to a torch module without a tokenizer"),
        (lambda: specqd.capture(nn.ReLU(), (torch.ones(3),), tokenizer="x"), "without a tokenizer"),
    ],
)
def test_wrong_arguments_are_errors(call, why):
    with pytest.raises(InputError, match=why):
        call()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((torch.ones(2, 4), torch.ones(1)), r"target was given 2 inputs and takes 1: input float32 \[2, 4\]"),
        ((torch.ones(2, 5),), r"target takes input float32 \[2, 4\], not float32 \[2, 5\]"),
        ((torch.ones(2),), r"not float32 \[2\]"),
        ((torch.ones(2, 4).long(),), r"not int64 \[2, 4\]"),
        (("text",), "give a tensor, not str"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(given, why):
    program = specqd.capture(nn.Linear(4, 3), (torch.ones(2, 4),))
    with pytest.raises(InputError, match=why):
        run(program, program.target, *given)


def test_a_node_whose_shape_takes_data_is_named():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((x, graph.call_function(torch.ops.aten.equal.default, (x, x))))
    entry = Entry("target", graph, inputs=(Input("x", "float32", (3,)),))
    with pytest.raises(CaptureError, match=r"the shape of %equal_default .* cannot be told without data"):
        example_values(Program({"target": entry}, {}, ModelInfo("toy", 0, 0)), entry, 1)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (3,)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_loss_that_looks_at_its_variances_is_captured(shape, reduction, rng):
    class Loss(nn.Module):
        def forward(self, x, target, var):
            return F.gaussian_nll_loss(x, target, var, True, reduction=reduction)

    given = (*(torch.randn(3, 4, generator=rng) for _ in range(2)), torch.rand(shape, generator=rng))
    torch.testing.assert_close(specqd.capture(Loss(), given).module()(*given), Loss()(*given))

"""quantize-int8: what is quantised and what is not, scales against their definitions, and onnxruntime's QDQ."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import Decoder, of, ops
from torch import nn

import specqd
from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.prune.calibration_data import Data
from specqd.passes.quantize.affine import affine
from specqd.passes.quantize.quantize_int8 import QuantizeINT8
from specqd.reference import run


class Block(nn.Module):
    """A residual block: the convolution that comes last takes the addition in."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


@pytest.fixture
def x(rng):
    return torch.randn(6, 3, 16, 16, generator=rng)


@pytest.fixture
def net(rng):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Block(8), nn.Conv2d(8, 8, 3, groups=8),
        nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3
    return net.eval().requires_grad_(False)


@pytest.fixture
def program(net, x):
    return specqd.capture(net, (x,))


def error(result, net, x):
    found = run(result.program, result.program.target, x)
    return float((found - net(x)).norm() / net(x).norm())


PAIR = ["quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor"]
WEIGHT = "quantized_decomposed.dequantize_per_channel"


def test_pairs_stand_where_kernels_can_take_them_in(program, net, x):
    result = QuantizeINT8(data=Data.of(x))(program)
    assert ops(result.program) == [
        *PAIR, WEIGHT, "aten.conv2d", "aten.relu", *PAIR, "aten.max_pool2d", WEIGHT, "aten.conv2d", "aten.relu", *PAIR,
        WEIGHT, "aten.conv2d", "aten.add", "aten.relu", *PAIR, WEIGHT, "aten.conv2d", "aten.hardswish", *PAIR,
        "aten.adaptive_avg_pool2d", *PAIR, "aten.flatten", WEIGHT, "aten.linear",
    ]  # fmt: skip
    assert (result.rewrites, result.refusals) == (5, ())
    assert [note.what for note in result.notes] == ["5 products in INT8, 6 activations"]
    assert QuantizeINT8(data=Data.of(x))(result.program).rewrites == 0


@pytest.mark.parametrize(
    ("ranges", "activations"),
    [("minmax", "asymmetric"), ("percentile", "asymmetric"), ("mse", "asymmetric"), ("mse", "symmetric")],
)
def test_outputs_stay_near(program, net, x, ranges, activations):
    result = QuantizeINT8(data=Data.of(x), ranges=ranges, activations=activations)(program)
    # 8 bits have steps of 1/255 of the range, 7 bits and a sign of 1/127; errors of six roundings in a row.
    assert error(result, net, x) < (0.03 if activations == "asymmetric" else 0.06)


def test_the_program_and_its_weights_stay(program, net, x):
    before = copy.deepcopy(net.state_dict())
    QuantizeINT8(data=Data.of(x))(program)
    assert not any("quantized" in op for op in ops(program))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_weights_are_off_by_half_a_step_and_zeros_stay(program, x):
    pruned = Pipeline.parse("sparsify{sparsity=0.5,allocation=uniform}")(program)
    result = QuantizeINT8(data=Data.of(x))(pruned)
    for name in ("0.weight", "8.weight", "3.first.weight"):
        weight = pruned.weights[name].flatten(1)
        values, scales = (result.program.weights[f"{name}.int8_{part}"] for part in ("values", "scales"))
        assert values.shape == pruned.weights[name].shape and not values.flatten(1)[weight == 0].any()
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((values.flatten(1) * scales[:, None] - weight).abs() <= step * 0.501).all()


def test_bias_correction_takes_the_mean_error_away(net, x, rng):
    # One product, so that its error is the model's.
    layer = nn.Conv2d(3, 8, 3)
    layer.weight.data = torch.randn(8, 3, 3, 3, generator=rng)
    program = specqd.capture(layer.eval(), (x,))
    means = {}
    for correction in (False, True):
        result = QuantizeINT8(data=Data.of(x), bias_correction=correction)(program)
        lost = run(result.program, result.program.target, x) - layer(x)
        means[correction] = lost.detach().mean((0, 2, 3)).abs()
    # What is left are roundings of float32 sums.
    assert means[True].max() < 1e-6 < means[False].max()


def test_ends_and_ignored_layers_stay_in_float(program, x):
    kept = QuantizeINT8(data=Data.of(x), first=False, last=False, ignore=("*second*",))(program)
    assert [r.why for r in kept.refusals] == [
        "it is the first product", "3.second.weight is ignored", "it is the last product",
    ]  # fmt: skip
    assert kept.rewrites == 2
    rest = QuantizeINT8(data=Data.of(x))(kept.program)
    assert rest.rewrites == 3
    assert [r.why for r in rest.refusals] == ["its weight is quantised already"] * 2


@pytest.mark.parametrize(
    ("module", "shape", "why"),
    [
        (nn.ConvTranspose2d(3, 4, 2), (6, 3, 4, 4), "conv_transpose2d has kernels for float32 alone"),
        (nn.Conv3d(3, 4, 2), (6, 3, 4, 4, 4), "conv3d has kernels for float32 alone"),
        (nn.Linear(4, 4).double(), (6, 4), "weight is not float32, or holds NaN or infinity, or nothing"),
    ],
)
def test_what_no_kernel_computes_is_refused(module, shape, why, rng):
    x = torch.randn(shape, generator=rng).to(next(module.parameters()).dtype)
    result = QuantizeINT8(data=Data.of(x))(specqd.capture(module.eval(), (x,)))
    assert [r.why for r in result.refusals] == [why]
    assert result.rewrites == 0


def test_activations_that_are_not_finite_are_refused(rng):
    class Overflow(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x) / 0)

    x = torch.randn(5, 4, generator=rng)
    result = QuantizeINT8(data=Data.of(x))(specqd.capture(Overflow().eval(), (x,)))
    why = "its input is not float32, or NaN or infinite on the calibration data"
    assert [r.why for r in result.refusals] == [why]
    assert result.rewrites == 1


def test_nothing_is_rounded_for_a_product_that_is_refused(rng):
    class Overflow(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return (x + self.only(x / 0)).mean((2, 3))

    x = torch.randn(2, 3, 4, 4, generator=rng)
    program = specqd.capture(Overflow().eval(), (x,))
    result = QuantizeINT8(data=Data.of(x))(program)
    assert (result.rewrites, len(result.refusals), ops(result.program)) == (0, 1, ops(program))


def test_language_models_are_refused():
    result = QuantizeINT8()(of(Decoder(lambda m, x, _: x)))
    assert [r.why for r in result.refusals] == [
        "language models have passes of their own: use cast-int8 or cast-mxfp4"
    ]


def test_parts_of_a_concatenation_share_a_scale(rng):
    class Join(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), 9 * self.b(x)], 1))

    x = torch.randn(4, 3, 5, 5, generator=rng)
    result = QuantizeINT8(data=Data.of(x))(specqd.capture(Join().eval(), (x,)))
    (join,) = [n for n in result.program.target.graph.nodes if "cat" in str(n.target)]
    first, second = join.args[0]
    assert first.args[1:] == second.args[1:] and first is not second


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"percentile": 50.0}, "a percentile of 50.0 cannot be used; give more than 50, up to 100"),
        ({"ranges": "most"}, "option ranges: 'most' is not one of minmax | percentile | mse"),
    ],
)
def test_options_are_checked(given, why):
    with pytest.raises(InputError, match=why.replace("|", r"\|")):
        QuantizeINT8(**given)


def test_a_pattern_that_matches_nothing_is_said(program, x):
    why = r"ignore=\*\.head matches no weight of a convolution or linear, such as 0.weight"
    with pytest.raises(InputError, match=why):
        QuantizeINT8(data=Data.of(x), ignore=("*.head",))(program)


def test_the_pipeline_is_text():
    text = "quantize-int8{data=random,samples=8,ranges=percentile,activations=symmetric}"
    assert str(Pipeline.parse(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30), st.booleans())
def test_a_range_is_covered_and_zero_exact(a, b, symmetric):
    least, most = sorted((a, b))
    how = affine(least, most, symmetric=symmetric)
    assert how.low <= how.zero <= how.high and 0 < how.scale < math.inf
    assert how.rounded(torch.zeros(1)).item() == 0
    ends = torch.tensor([least, most], dtype=torch.float32).clamp(-3e38, 3e38)
    # The zero point is rounded: an end may be cut off by half a step, and is rounded by another half.
    assert ((how.rounded(ends) - ends).abs() <= how.scale * 1.001).all()


def test_percentiles_leave_outliers_out_and_mse_errs_least(rng):
    values = torch.randn(20_000, 1, generator=rng)
    values[0] = 100.0
    program = specqd.capture(nn.Linear(1, 1).eval(), (values,))
    scale, lost = {}, {}
    for ranges in ("minmax", "percentile", "mse"):
        result = QuantizeINT8(data=Data.of(values), ranges=ranges, percentile=99.9)(program)
        pair = next(n for n in result.program.target.graph.nodes if "quantize_per_tensor" in str(n.target))
        scale[ranges] = pair.args[1]
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(values, *pair.args[1:])
        back = torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *pair.args[1:])
        lost[ranges] = float((back - values).square().mean())
    assert scale["percentile"] < 0.05 < 0.3 < scale["minmax"]
    assert lost["mse"] <= lost["minmax"]


def test_onnxruntime_gives_the_same_codes(program, net, x, tmp_path):
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    result = QuantizeINT8(data=Data.of(x))(program)
    path = tmp_path / "model.onnx"
    torch.onnx.export(result.program.module(), (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = run(result.program, result.program.target, x).numpy()
    pairs = [n for n in result.program.target.graph.nodes if "quantize_per_tensor" in str(n.target)]
    weight = result.program.weights["8.weight"]
    # One step of the last quantiser through the last matrix; the steps before are the same but for ties.
    step = pairs[-1].args[1] * float(weight.abs().sum(1).max())
    assert np.abs(found - wanted).max() <= step

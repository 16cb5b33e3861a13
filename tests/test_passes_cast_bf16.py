"""cast-bf16: what is rounded to BF16 and what is not, and that the graph computes what its specification says."""

import pytest
import torch
from small_programs import ops
from torch import nn
from torch.nn import functional as F  # noqa: N812

import specqd
from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.quantize.cast_bf16 import CastBF16

PAIR = ["aten._to_copy", "aten._to_copy"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5), nn.Tanh()).eval()


@pytest.fixture
def x(rng):
    return torch.randn(2, 3, 4, 4, generator=rng)


def test_pairs_stand_where_kernels_can_take_them_in(net, x):
    program = specqd.capture(net, (x,))
    result = CastBF16()(program)
    assert ops(result.program) == [
        *PAIR, "aten._to_copy", "aten.conv2d", "aten.relu", *PAIR, "aten.flatten", "aten._to_copy", "aten.linear",
        "aten.tanh",
    ]  # fmt: skip
    assert (result.rewrites, result.refusals) == (2, ())
    assert not any("_to_copy" in op for op in ops(program))
    again = CastBF16()(result.program)
    assert (again.rewrites, [r.why for r in again.refusals]) == (0, ["its weight is quantised already"] * 2)


@torch.no_grad()
def test_products_are_those_of_rounded_numbers(net, x):
    def short(t):
        return t.bfloat16().float()

    first, last = net[0], net[3]
    y = F.conv2d(short(x), short(first.weight), first.bias).relu()
    wanted = F.linear(short(y).flatten(1), short(last.weight), last.bias).tanh()
    # The same operators on the same numbers.
    assert torch.equal(CastBF16()(specqd.capture(net, (x,))).program.module()(x), wanted)


def test_what_is_ignored_or_has_no_kernel_stays_and_says_why(net, x):
    kept = CastBF16(ignore=("3.*",))(specqd.capture(net, (x,)))
    assert (kept.rewrites, [r.why for r in kept.refusals]) == (1, ["3.weight is ignored"])
    net[0].weight.data[0, 0, 0, 0] = torch.nan
    program = specqd.capture(net, (x,))
    why = "0.weight is not float32, or holds NaN or infinity, or nothing"
    assert [r.why for r in CastBF16()(program).refusals] == [why]
    up = specqd.capture(nn.ConvTranspose2d(3, 4, 2).eval(), (x,))
    assert [r.why for r in CastBF16()(up).refusals] == ["conv_transpose2d has kernels for float32 alone"]
    with pytest.raises(InputError, match="ignore=4 matches no weight of a convolution or linear"):
        CastBF16(ignore=("4",))(program)


def test_the_pipeline_is_text():
    text = "cast-bf16{ignore=*.head.*}"
    assert str(Pipeline.parse(text)) == text

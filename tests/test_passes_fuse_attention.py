import math

import pytest
import torch
from small_modules import calls, of
from torch.export import Dim
from torch.testing import assert_close

from specqd.passes.fuse_attention import FuseAttention

MINUS = float("-inf")
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)

# Each way to scale, with each way to mask: what is written for queries, keys and values [2, 3, 5, 8].
SCALED = {
    "scores times": lambda q, k: q @ k.transpose(-2, -1) * 0.3,
    "scores divided": lambda q, k: q @ k.transpose(2, 3) / math.sqrt(8),
    "queries times": lambda q, k: (0.3 * q) @ k.transpose(-1, -2),
    "queries divided": lambda q, k: (q / 3.0) @ k.transpose(-2, -1),
    "keys times": lambda q, k: q @ (k.transpose(-2, -1) * 0.3),
    "not at all": lambda q, k: q @ k.mT,
    "keys that come transposed": lambda q, k: q @ k.permute(0, 1, 3, 2) * 0.3,
}
MASKED = {
    "all": lambda m, s: s,
    "added": lambda m, s: s + m.mask,
    "filled": lambda m, s: s.masked_fill(m.later, MINUS),
    "filled with a billion": lambda m, s: s.masked_fill(m.nobody, -1e9),
    "filled with the least number": lambda m, s: s.masked_fill(m.later, torch.finfo(s.dtype).min),
}


def given(rng, *sizes):
    return [torch.randn(*size, generator=rng) for size in sizes or [(2, 3, 5, 8)] * 3]


def program_of(body, rng, *sizes, **capture):
    mask = torch.zeros(5, 5).masked_fill(LATER, MINUS)
    nobody = LATER.index_fill(0, torch.tensor([2]), True)  # the third query sees nothing
    wide = mask.expand(2, 1, 5, 5)
    return of(body, *given(rng, *sizes), mask=mask, later=LATER, nobody=nobody, batches=wide, **capture)


@pytest.mark.parametrize("scaled", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
def test_each_way_to_write_it_becomes_one_operator(scaled, masked, rng):
    program = program_of(lambda m, q, k, v: masked(m, scaled(q, k)).softmax(-1) @ v, rng)
    result = FuseAttention()(program)
    left = set(calls(result.program)) - {"zeros_like", "masked_fill", "permute", "transpose", "mT"}
    assert left == {"scaled_dot_product_attention"} and not result.refusals
    tensors = given(rng)
    # Sums of 8 and of 5 products in another order.
    assert_close(result.program.module()(*tensors), program.module()(*tensors), rtol=1e-5, atol=1e-6)
    again = FuseAttention()(result.program)
    assert again.rewrites == 0 and not again.refusals


def test_keys_transposed_twice_are_the_keys(rng):
    program = program_of(lambda m, q, k, v: (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v, rng)
    assert calls(program) == ["transpose", "matmul", "mul", "softmax", "matmul"]
    assert calls(FuseAttention()(program).program) == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("mask", [torch.tensor([0.0, MINUS, 1.0, 0.0, 2.0]), torch.tensor(2.0)])
def test_a_mask_of_fewer_than_two_dimensions_is_spread(mask, rng):
    program = program_of(lambda m, q, k, v: (q @ k.mT + m.small).softmax(-1) @ v, rng, small=mask)
    result = FuseAttention()(program)
    assert set(calls(result.program)) == {"expand", "scaled_dot_product_attention"}
    tensors = given(rng)
    assert_close(result.program.module()(*tensors), program.module()(*tensors), rtol=1e-5, atol=1e-6)


def test_three_dimensions_and_a_softmax_in_float32(rng):
    sizes = [(6, 5, 8)] * 3
    program = program_of(
        lambda m, q, k, v: torch.softmax(q @ k.mT / 2.0, -1, dtype=torch.float32) @ v, rng, *sizes
    )
    result = FuseAttention()(program)
    assert "scaled_dot_product_attention" in calls(result.program)
    tensors = given(rng, *sizes)
    assert_close(result.program.module()(*tensors), program.module()(*tensors), rtol=1e-5, atol=1e-6)


def test_open_sizes_stay_open(rng):
    dynamic = tuple({0: Dim("b", max=9), 2: Dim("s", max=99)} for _ in range(3))
    program = of(lambda m, q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, *given(rng), dynamic=dynamic)
    result = FuseAttention()(program)
    assert result.rewrites > 0
    tensors = given(rng, *[(3, 3, 11, 8)] * 3)
    assert_close(result.program.module()(*tensors), program.module()(*tensors), rtol=1e-5, atol=1e-6)


REFUSED = {
    "weights are an output": (
        lambda m, q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v, w),
        "softmax is also used elsewhere",
    ),
    "a softmax over queries": (
        lambda m, q, k, v: (q @ k.mT * 0.3).softmax(-2) @ v,
        None,
    ),
    "a sigmoid": (lambda m, q, k, v: torch.sigmoid(q @ k.mT * 0.3) @ v, None),
    "a scale that is a tensor": (
        lambda m, q, k, v: (q @ k.mT * m.mask).softmax(-1) @ v,
        "other of mul is mask, not the number that is meant",
    ),
    "a mask that makes more scores": (
        lambda m, q, k, v: (q[:1] @ k[:1].mT + m.batches).softmax(-1) @ v[:1],
        "its mask is [2, 1, 5, 5], which makes more scores than there are",
    ),
    "a mask of bools that is added": (
        lambda m, q, k, v: (q @ k.mT + m.later).softmax(-1) @ v,
        "it is computed in torch.bool, not in float32 throughout",
    ),
    "a number that hides nothing": (
        lambda m, q, k, v: (q @ k.mT).masked_fill(m.later, 0.0).softmax(-1) @ v,
        "0.0 is filled in, beside which scores do not vanish",
    ),
    "a number that hides by comparison": (
        lambda m, q, k, v: (q @ k.mT).masked_fill(m.later, -1e4).softmax(-1) @ v,
        "-10000.0 is filled in, beside which scores do not vanish",
    ),
    "float64": (
        lambda m, q, k, v: (q.double() @ k.double().mT).softmax(-1) @ v.double(),
        "it is computed in torch.float64, not in float32 throughout",
    ),
    "one head of keys": (
        lambda m, q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
        "queries, keys and values are of [2, 3], [2, 1], [2, 1] matrices",
    ),
    "one matrix of keys": (
        lambda m, q, k, v: (q @ k[0, 0].mT).softmax(-1) @ v,
        "queries, keys and values have 4, 2 and 4 dimensions, not all 3 or 4",
    ),
}


@pytest.mark.parametrize(("body", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_attention_is_left_alone_and_said_so(body, why, rng):
    program = program_of(body, rng)
    result = FuseAttention()(program)
    assert result.rewrites == 0 and calls(result.program) == calls(program)
    assert why is None or [r.why for r in result.refusals] == [why]


def test_a_division_by_zero_stays_as_it_is(rng):
    result = FuseAttention()(program_of(lambda m, q, k, v: (q @ k.mT / 0.0).softmax(-1) @ v, rng))
    assert result.rewrites == 0 and [r.why.endswith("division by zero") for r in result.refusals] == [True]

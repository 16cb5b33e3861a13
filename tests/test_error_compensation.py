"""Error compensation against optimal brain surgery written out row by row, and against the direct cast."""

import pytest
import torch
from torch import Tensor

from specqd.errors import InputError
from specqd.passes.quantize.error_compensation import compensate, inverse_factor
from specqd.passes.quantize.mxfp4 import (
    BLOCK,
    SCALE_MAX,
    SCALE_NAN,
    SCALE_RULES,
    choose_scales,
    decode,
    encode,
    encode_with,
)

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def correlated(rng: torch.Generator, rows: int, columns: int) -> Tensor:
    """Inputs that lie near a space of fewer dimensions, as a model's activations do."""
    few = torch.randn(rows, columns // 4, generator=rng)
    spread = torch.exp2(torch.randn(columns, generator=rng))
    mixed = few @ torch.randn(columns // 4, columns, generator=rng)
    return (mixed + 0.3 * torch.randn(rows, columns, generator=rng)) * spread


def by_surgery(weight: Tensor, gram: Tensor, damping: float, rule: str) -> Tensor:
    """Round column by column, updating the rest of the row and the inverse by Gaussian elimination (OBQ, eq. 2-3)."""
    inverse = torch.linalg.inv(
        gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram))
    )
    rest = weight.double().clone()
    for i in range(rest.shape[1]):
        if i % BLOCK == 0:
            scale = choose_scales(rest[:, i : i + BLOCK].float(), rule)[:, 0].double()
        unit = torch.exp2(scale - 127)
        sign, magnitude = rest[:, i].sign(), rest[:, i].abs() / unit
        rounded = sign * unit * GRID[(magnitude[:, None] - GRID).abs().argmin(1)]
        error = (rest[:, i] - rounded) / inverse[i, i]
        rest[:, i + 1 :] -= error[:, None] * inverse[i, i + 1 :]
        rest[:, i] = rounded
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]
    return rest


def output_error(weight: Tensor, cast: tuple[Tensor, Tensor], inputs: Tensor) -> float:
    return float((inputs @ (weight.float() - decode(*cast)).T).square().mean())


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_each_row_is_rounded_as_by_surgery(rule: str, rng: torch.Generator):
    inputs, weight = correlated(rng, 300, 96), torch.randn(16, 96, generator=rng)
    gram = inputs.T @ inputs
    got = decode(*compensate(weight, inverse_factor(gram, 0.01), rule))
    # No element of this sample lies so near the middle between two values that float32 rounds it otherwise.
    assert torch.equal(got.double(), by_surgery(weight, gram, 0.01, rule))


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_on_other_inputs_are_nearer_than_those_of_the_direct_cast(rule, dtype, rng: torch.Generator):
    weight = torch.randn(64, 128, generator=rng).to(dtype)
    both = correlated(rng, 2000, 128)
    inputs, unseen = both[:1000], both[1000:]
    cast = compensate(weight, inverse_factor(inputs.T @ inputs, 0.01), rule)
    assert output_error(weight, cast, unseen) < 0.5 * output_error(weight, encode(weight, rule), unseen)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_uncorrelated_inputs_give_the_direct_cast(rule: str, rng: torch.Generator):
    weight = torch.randn(8, 64, generator=rng)
    factor = inverse_factor(torch.diag(torch.rand(64, generator=rng) + 0.5), 0.01)
    for got, expected in zip(compensate(weight, factor, rule), encode(weight, rule), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_a_weight_on_the_grid_stays(rule: str, rng: torch.Generator):
    inputs, weight = correlated(rng, 300, 96), torch.randn(16, 96, generator=rng)
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    once = decode(*compensate(weight, factor, rule))
    assert torch.equal(decode(*compensate(once, factor, rule)), once)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scales_are_legal_and_bytes_canonical(rule: str, rng: torch.Generator):
    inputs = correlated(rng, 300, 64)
    weight = torch.randn(16, 64, generator=rng) * torch.exp2(torch.linspace(-120, 124, 16))[:, None]
    blocks, scales = compensate(weight, inverse_factor(inputs.T @ inputs, 0.01), rule)
    assert int(scales.max()) <= SCALE_MAX
    assert decode(blocks, scales).isfinite().all()
    assert torch.equal(encode_with(decode(blocks, scales), scales).blocks, blocks)  # no negative zeros


def test_a_broken_row_is_cast_directly_and_disturbs_no_other(rng: torch.Generator):
    inputs, weight = correlated(rng, 300, 64), torch.randn(4, 64, generator=rng)
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    alone = compensate(weight, factor)
    weight[1, 40], weight[3, 0] = float("nan"), float("inf")
    cast = compensate(weight, factor)
    for part, expected, direct in zip(cast, alone, encode(weight, "search"), strict=True):
        assert torch.equal(part[[0, 2]], expected[[0, 2]])
        assert torch.equal(part[[1, 3]], direct[[1, 3]])
    assert (cast.scales == SCALE_NAN).tolist()[1] == [False, True]


@pytest.mark.parametrize("count", [1, 20, 64])
def test_the_factor_is_that_of_the_inverse_also_of_a_singular_gram(count: int, rng: torch.Generator):
    inputs = torch.randn(count, 64, generator=rng)
    gram = inputs.T @ inputs
    factor = inverse_factor(gram, 0.01)
    assert torch.equal(factor, factor.triu())
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(64)
    # Float32 entries of a matrix with a condition number of up to 6400.
    torch.testing.assert_close(
        factor.double().T @ factor.double() @ damped, torch.eye(64).double(), rtol=0, atol=1e-3
    )


def test_dead_inputs_take_no_part(rng: torch.Generator):
    inputs, weight = correlated(rng, 300, 64), torch.randn(8, 64, generator=rng)
    inputs[:, 32:] = 0
    gram = inputs.T @ inputs
    cast = compensate(weight, inverse_factor(gram, 0.01))
    alive = compensate(weight[:, :32], inverse_factor(gram[:32, :32], 0.01))
    dead = encode(weight[:, 32:], "search")
    assert torch.equal(cast.blocks, torch.cat([alive.blocks, dead.blocks], 1))
    assert torch.equal(inverse_factor(torch.zeros(64, 64), 0.01), torch.eye(64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_refused(bad: float):
    gram = torch.eye(32)
    gram[3, 4] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        inverse_factor(gram, 0.01)


def test_a_matrix_that_is_no_gram_is_refused():
    with pytest.raises(InputError, match=r"not positive definite with a damping of 0.01; give a larger"):
        inverse_factor(torch.eye(32) - 0.5, 0.01)


def test_a_factor_for_other_inputs_is_refused():
    with pytest.raises(InputError, match=r"\[32, 32\] does not belong to a weight \[4, 64\]"):
        compensate(torch.ones(4, 64), torch.eye(32))
    with pytest.raises(InputError, match=r"blocks of 32"):
        compensate(torch.ones(4, 40), torch.eye(40))


def test_the_weight_is_not_touched(rng: torch.Generator):
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(8, 64, generator=rng).to(dtype)
        before = weight.clone()
        compensate(weight, inverse_factor(torch.ones(64, 64), 0.01))
        assert torch.equal(weight, before)

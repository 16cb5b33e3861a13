"""The INT8 codec against exact arithmetic on each row."""

import math
from fractions import Fraction

import pytest
import torch

from specqd.errors import InputError
from specqd.passes.quantize.int8 import decode, encode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_and_values_are_those_of_exact_arithmetic(dtype: torch.dtype, rng: torch.Generator):
    weight = (torch.randn(24, 67, generator=rng) * torch.exp2(torch.randn(24, 1, generator=rng) * 4)).to(
        dtype
    )
    values, scales = encode(weight)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32
    for row, integers, scale in zip(weight.tolist(), values.tolist(), scales.tolist(), strict=True):
        ideal = Fraction(max(map(abs, row))) / 127
        assert abs(Fraction(scale) / ideal - 1) <= Fraction(1, 1 << 24)
        for number, integer in zip(row, integers, strict=True):
            # The float32 quotient may sit on the other side of a tie, by its own rounding and no more.
            assert abs(Fraction(number) / Fraction(scale) - integer) <= Fraction(1, 2) + Fraction(1, 1 << 17)


def test_the_largest_of_a_row_is_127_and_minus_128_never_appears(rng: torch.Generator):
    values, _ = encode(torch.randn(512, 96, generator=rng))
    assert (values.abs().amax(-1) == 127).all()
    assert values.min() == -127


def test_ties_round_to_the_even_integer():
    halves = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    assert encode(halves).values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


def test_decoding_is_off_by_half_a_scale_at_most(rng: torch.Generator):
    weight = torch.randn(64, 200, generator=rng)
    values, scales = encode(weight)
    assert ((decode(values, scales) - weight).abs() <= scales[:, None] * (0.5 + 1e-5)).all()


def test_encoding_what_was_decoded_changes_no_integer(rng: torch.Generator):
    once = encode(torch.randn(4096, 64, generator=rng).bfloat16())
    twice = encode(decode(*once))
    assert torch.equal(once.values, twice.values)
    # 127 * scale / 127 can come back one rounding away.
    torch.testing.assert_close(once.scales, twice.scales, rtol=2**-23, atol=0)


@pytest.mark.parametrize("tiny", [0.0, -0.0, 2.0**-149, 126 * 2.0**-126])
def test_rows_too_small_for_a_scale_are_zero(tiny: float):
    values, scales = encode(torch.full((2, 8), tiny))
    assert not values.any() and scales.tolist() == [0.0, 0.0]
    assert decode(values, scales).tolist() == [[0.0] * 8] * 2


def test_the_smallest_and_the_largest_scale_work():
    for edge in (128 * 2.0**-126, torch.finfo(torch.bfloat16).max):
        values, scales = encode(torch.tensor([[edge, -edge, 0.0]]))
        assert values.tolist() == [[127, -127, 0]]
        assert decode(values, scales).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_make_their_row_nan_and_no_other(bad: float):
    weight = torch.ones(3, 8)
    weight[1, 5] = bad
    values, scales = encode(weight)
    assert scales.isnan().tolist() == [False, True, False]
    decoded = decode(values, scales)
    assert decoded[1].isnan().all() and decoded[::2].isfinite().all()


def test_the_weight_is_not_touched_and_rows_stand_alone(rng: torch.Generator):
    weight = torch.randn(1024, 1100, generator=rng).requires_grad_()
    before = weight.detach().clone()
    whole = encode(weight)
    assert torch.equal(weight.detach(), before)
    parts = [encode(part) for part in weight.split([1, 900, 123])]
    across = encode(weight.t().contiguous().t())
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
        assert torch.equal(whole[i], across[i])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 3, 8)])
def test_leading_dimensions_and_emptiness_are_kept(shape: tuple[int, ...]):
    values, scales = encode(torch.ones(shape))
    assert values.shape == shape and scales.shape == shape[:-1]
    assert decode(values, scales).shape == shape


def test_other_dtypes_and_vectors_are_refused():
    with pytest.raises(InputError, match=r"float64.*give a bfloat16"):
        encode(torch.ones(2, 8, dtype=torch.float64))
    with pytest.raises(InputError, match=r"needs a matrix.*\[8\]"):
        encode(torch.ones(8))


@pytest.mark.parametrize(
    ("values", "scales", "why"),
    [
        (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2), "int8 and float32"),
        (torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2, dtype=torch.bfloat16), "int8 and float32"),
        (torch.zeros(2, 8, dtype=torch.int8), torch.zeros(3), "do not belong together"),
        (torch.tensor(1, dtype=torch.int8), torch.zeros(()), "do not belong together"),
    ],
)
def test_tensors_that_are_no_matrix_are_refused(values: torch.Tensor, scales: torch.Tensor, why: str):
    with pytest.raises(InputError, match=why):
        decode(values, scales)

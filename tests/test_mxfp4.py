"""The MXFP4 codec against ml_dtypes and against a slow scalar reference in exact arithmetic."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specqd.errors import InputError
from specqd.passes.quantize.mxfp4 import (
    BLOCK,
    SCALE_MAX,
    SCALE_NAN,
    SCALE_RULES,
    choose_scales,
    decode,
    encode,
    encode_with,
    nearest,
)

MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
UNSCALED = 127  # the scale byte of 2^0


def nibbles(blocks: torch.Tensor) -> torch.Tensor:
    return torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, so that +0 and -0 differ and NaN equals NaN."""
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def row(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One block that starts with `values` and goes on with zeros."""
    return torch.tensor([[*values, *[0.0] * (BLOCK - len(values))]], dtype=dtype)


def bf16_from_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def code_of(value: Fraction, scale: int) -> int:
    """E2M1 code of `value`: nearest, then even code; beyond 6 the nearest is 6. A zero is +0."""
    x = abs(value) / Fraction(2) ** (scale - 127)
    code = min(range(8), key=lambda c: (abs(MAGNITUDES[c] - x), c % 2))
    return code + 8 if code and value < 0 else code


def scale_of(largest: Fraction, rule: str) -> int:
    """Scale byte of a block, `largest` being its (normal) largest magnitude, for every rule but search."""
    exponent = math.frexp(float(largest))[1] - 1
    mantissa = largest / Fraction(2) ** exponent
    threshold = {
        "floor": mantissa >= 2,
        "even": mantissa >= Fraction(7, 4),
        "rceil": mantissa > Fraction(3, 2),
    }
    return min(max(exponent - 2 + threshold[rule] + 127, 0), SCALE_MAX)


def error_of(values: list[Fraction], scale: int) -> Fraction:
    unit = Fraction(2) ** (scale - 127)
    return sum(((abs(v) - MAGNITUDES[code_of(abs(v), scale)] * unit) ** 2 for v in values), Fraction())


def reference(block: list[float], rule: str) -> tuple[list[int], int]:
    """Codes and scale byte of one block, after the authors' pseudo-code and in exact arithmetic."""
    if not all(math.isfinite(v) for v in block):
        return [0] * BLOCK, SCALE_NAN
    values = [Fraction(v) for v in block]
    largest = max(abs(v) for v in values)
    if largest < Fraction(2) ** -126:
        return [0] * BLOCK, 0
    if rule == "search":
        floor = scale_of(largest, "floor")
        tried = sorted({min(max(floor + d, 0), SCALE_MAX) for d in (-1, 0, 1)})
        scale = min(tried, key=lambda s: (error_of(values, s), s))
    else:
        scale = scale_of(largest, rule)
    return [code_of(v, scale) for v in values], scale


def assert_as_reference(weight: torch.Tensor, rule: str) -> None:
    blocks, scales = encode(weight, rule)
    codes = nibbles(blocks).view(-1, BLOCK)
    for i, block in enumerate(weight.float().view(-1, BLOCK).tolist()):
        assert (codes[i].tolist(), scales.view(-1)[i].item()) == reference(block, rule), block


# Decoding


def test_every_byte_at_every_scale_decodes_as_in_ml_dtypes():
    byte, scale = torch.arange(256, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)
    blocks = byte.view(1, 16, 16).expand(256, 16, 16).reshape(256, 256)
    scales = scale.view(256, 1).expand(256, 16).contiguous()
    elements = nibbles(blocks).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = torch.from_numpy((elements * factors).astype(np.float32))
    decoded = decode(blocks, scales)
    assert bits_equal(decoded[:255], expected[:255])
    assert decoded[255].isnan().all() and expected[255].isnan().all()


def test_the_first_of_two_neighbours_is_in_the_low_nibble():
    blocks, scales = encode(row(1.0, -6.0))
    assert blocks[0, :2].tolist() == [0xF2, 0x00]
    assert decode(blocks, scales)[0, :3].tolist() == [1.0, -6.0, 0.0]


# Encoding


def test_every_bf16_value_rounds_as_ml_dtypes_does():
    finite = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    below_8 = finite[finite.abs() < 8]
    # A leading 4 fixes the scale at 1 for whatever else below 8 is in the block.
    rows = torch.nn.functional.pad(below_8, (0, -len(below_8) % 31)).view(-1, 31)
    weight = torch.nn.functional.pad(rows, (1, 0), value=4.0)
    blocks, scales = encode(weight, "floor")
    assert scales.unique().tolist() == [UNSCALED]
    expected = weight.float().numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    expected = np.where(expected == 8, 0, expected)
    np.testing.assert_array_equal(nibbles(blocks).numpy(), expected)


@pytest.mark.parametrize(
    ("between", "code"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]
)
def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearest(between: float, code: int):
    below, above = (float(np.nextafter(np.float32(between), np.float32(end))) for end in (0, 9))
    lower = {0.25: 0, 0.75: 1, 1.25: 2, 1.75: 3, 2.5: 4, 3.5: 5, 5.0: 6}[between]
    blocks, _ = encode(row(4.0, below, between, above, -below, -between, -above))
    expected = [lower, code, lower + 1]
    negative = [c + 8 if c else 0 for c in expected]
    assert nibbles(blocks)[0, 1:7].tolist() == expected + negative


@pytest.mark.parametrize(
    ("largest", "floor", "even", "rceil"),
    [
        (4.0, 0, 0, 0),
        (6.0, 0, 0, 0),
        (6.03125, 0, 0, 1),
        (6.96875, 0, 0, 1),
        (7.0, 0, 1, 1),
        (7.96875, 0, 1, 1),
        (8.0, 1, 1, 1),
    ],
)
def test_each_rule_steps_up_where_it_says(largest: float, floor: int, even: int, rceil: int):
    weight = row(largest, dtype=torch.bfloat16)
    got = [encode(weight, rule).scales.item() - UNSCALED for rule in ("floor", "even", "rceil")]
    assert got == [floor, even, rceil]


def test_the_thresholds_of_rceil_and_even_are_exact_to_one_float():
    above_6, below_7 = (float(np.nextafter(np.float32(a), np.float32(b))) for a, b in [(6, 7), (7, 6)])
    assert encode(row(above_6), "rceil").scales.item() == UNSCALED + 1
    assert encode(row(below_7), "even").scales.item() == UNSCALED


@pytest.mark.parametrize(
    ("values", "step"),
    [
        # At scale 1 each quarter loses 1/16; at scale 1/2 the quarters are exact and the 4 loses 1.
        ([4.0] + [0.25] * 17, -1),
        ([4.0] + [0.25] * 16, -1),
        ([4.0] + [0.25] * 15, 0),
        # At scale 1 these become 6, at scale 2 they become 8.
        ([7.0], 0),
        ([7.25], 1),
    ],
)
def test_search_takes_the_least_error_and_on_a_tie_the_lower_exponent(values: list[float], step: int):
    assert encode(row(*values), "search").scales.item() == UNSCALED + step


def test_floor_saturates_maxima_between_six_and_eight_scales():
    blocks, scales = encode(row(7.99, -7.99, 5.01))
    assert decode(blocks, scales)[0, :3].tolist() == [6.0, -6.0, 6.0]


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_weights_encode_as_the_scalar_reference(rule: str, dtype: torch.dtype, rng: torch.Generator):
    spread = torch.exp2(torch.randn(12, 96, generator=rng) * 3)
    assert_as_reference((torch.randn(12, 96, generator=rng) * spread * 0.02).to(dtype), rule)


any_bf16 = st.lists(st.integers(0, 65535), min_size=BLOCK, max_size=BLOCK).map(bf16_from_bits)
near_one_bf16 = st.lists(
    st.integers(0x3E00, 0x4100) | st.integers(0xBE00, 0xC100), min_size=BLOCK, max_size=BLOCK
).map(bf16_from_bits)
smallest_bf16 = st.lists(
    st.integers(0, 0x0200) | st.integers(0x8000, 0x8200), min_size=BLOCK, max_size=BLOCK
).map(bf16_from_bits)
largest_bf16 = st.lists(
    st.integers(0x7E00, 0x7F7F) | st.integers(0xFE00, 0xFF7F), min_size=BLOCK, max_size=BLOCK
).map(bf16_from_bits)
float32s = st.lists(st.floats(-8, 8, width=32), min_size=BLOCK, max_size=BLOCK).map(torch.tensor)
blocks_of_32 = any_bf16 | near_one_bf16 | smallest_bf16 | largest_bf16 | float32s


@pytest.mark.parametrize("rule", SCALE_RULES)
@settings(deadline=None)
@given(block=blocks_of_32)
def test_any_block_encodes_as_the_scalar_reference(rule: str, block: torch.Tensor):
    assert_as_reference(block.view(1, BLOCK), rule)


@settings(deadline=None)
@given(block=near_one_bf16 | smallest_bf16 | largest_bf16 | float32s)
def test_search_is_never_worse_than_floor(block: torch.Tensor):
    exact = block.double()
    error = {
        rule: float((decode(*encode(block, rule)).double() - exact).square().sum()) for rule in SCALE_RULES
    }
    assert error["search"] <= error["floor"] * (1 + 1e-12)


def test_search_beats_floor_on_gaussian_weights(rng: torch.Generator):
    weight = torch.randn(64, 576, generator=rng)
    error = {rule: (decode(*encode(weight, rule)) - weight).square().mean().item() for rule in SCALE_RULES}
    assert error["search"] < 0.95 * error["floor"]


@pytest.mark.parametrize("rule", SCALE_RULES)
@settings(deadline=None)
@given(block=blocks_of_32)
def test_encoding_what_was_decoded_changes_no_byte(rule: str, block: torch.Tensor):
    once = encode(block, rule)
    twice = encode(decode(*once), rule)
    # rceil can leave 3 as the largest element, then written as 6 at half the scale: only the values agree.
    if rule != "rceil":
        assert torch.equal(once.blocks, twice.blocks) and torch.equal(once.scales, twice.scales)
    assert bits_equal(decode(*once).nan_to_num(nan=1.0), decode(*twice).nan_to_num(nan=1.0))


# Edges


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_zero_blocks_are_zero_bytes(rule: str):
    blocks, scales = encode(torch.tensor([[0.0, -0.0] * 16]), rule)
    assert not blocks.any() and not scales.any()


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_make_their_block_nan_and_no_other(rule: str, bad: float, dtype: torch.dtype):
    weight = torch.ones(2, 64, dtype=dtype)
    weight[0, 33] = bad
    blocks, scales = encode(weight, rule)
    assert (scales == SCALE_NAN).tolist() == [[False, True], [False, False]]
    decoded = decode(blocks, scales)
    assert decoded[0, 32:].isnan().all()
    assert bits_equal(decoded[0, :32], torch.ones(32)) and bits_equal(decoded[1], torch.ones(64))


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_subnormals_count_beside_a_normal_and_vanish_without_one(rule: str):
    tiny = 2.0**-126
    assert_as_reference(row(tiny, tiny / 2, -tiny / 4, tiny / 8), rule)
    assert decode(*encode(row(tiny, tiny / 2, -tiny / 4), rule))[0, :3].tolist() == [
        tiny,
        tiny / 2,
        -tiny / 4,
    ]
    blocks, scales = encode(row(tiny - 2.0**-149, tiny / 2), rule)
    assert not blocks.any() and not scales.any()


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_the_largest_float_stays_finite(rule: str):
    largest = torch.finfo(torch.float32).max
    blocks, scales = encode(row(largest, -largest, 1.0), rule)
    assert scales.item() == SCALE_MAX
    assert decode(blocks, scales)[0, :3].tolist() == [6 * 2.0**125, -6 * 2.0**125, 0.0]


def test_the_weight_is_not_touched(rng: torch.Generator):
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(8, 64, generator=rng).to(dtype).requires_grad_()
        before = weight.detach().clone()
        for rule in SCALE_RULES:
            blocks, scales = encode(weight, rule)
            copies = blocks.clone(), scales.clone()
            decode(blocks, scales)
            assert torch.equal(blocks, copies[0]) and torch.equal(scales, copies[1])
        assert torch.equal(weight.detach(), before)


def test_rows_do_not_depend_on_each_other_or_on_memory_order(rng: torch.Generator):
    weight = torch.randn(400, 4096, generator=rng).bfloat16()
    whole = encode(weight, "search")
    alone = [encode(part, "search") for part in weight.split([1, 200, 199])]
    across = encode(weight.t().contiguous().t(), "search")
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in alone]))
        assert torch.equal(whole[i], across[i])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (32,), (2, 3, 64)])
def test_leading_dimensions_and_emptiness_are_kept(shape: tuple[int, ...]):
    weight = torch.ones(shape)
    blocks, scales = encode(weight)
    assert blocks.shape == (*shape[:-1], shape[-1] // 2) and scales.shape == (*shape[:-1], shape[-1] // 32)
    assert bits_equal(decode(blocks, scales), weight)


# Refusals


@pytest.mark.parametrize("shape", [(4, 40), (4, 31), (1,), ()])
def test_a_broken_block_is_refused(shape: tuple[int, ...]):
    with pytest.raises(InputError, match=r"blocks of 32.*pad its columns"):
        encode(torch.ones(shape))


def test_an_unknown_rule_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(InputError, match="'ceil'; choose one of floor, even, rceil, search"):
        encode(torch.ones(1, 32), "ceil")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype):
    with pytest.raises(InputError, match=str(dtype)):
        encode(torch.ones(1, 32, dtype=dtype))


@pytest.mark.parametrize(
    ("blocks", "scales", "why"),
    [
        (torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1), "uint8"),
        (
            torch.zeros(2, 16, dtype=torch.uint8),
            torch.zeros(2, 2, dtype=torch.uint8),
            "do not belong together",
        ),
        (
            torch.zeros(2, 16, dtype=torch.uint8),
            torch.zeros(1, 1, dtype=torch.uint8),
            "do not belong together",
        ),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8), "do not belong together"),
        (torch.tensor(1, dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8), "do not belong together"),
    ],
)
def test_tensors_that_are_no_matrix_are_refused(blocks: torch.Tensor, scales: torch.Tensor, why: str):
    with pytest.raises(InputError, match=why):
        decode(blocks, scales)


# Parts of the cast


@pytest.mark.parametrize("rule", SCALE_RULES)
@settings(deadline=None)
@given(block=near_one_bf16 | smallest_bf16 | largest_bf16 | float32s)
def test_nearest_gives_the_values_of_the_cast(rule: str, block: torch.Tensor):
    scale = choose_scales(block.float(), rule)
    rounded = nearest(block.float(), scale)
    # Blocks of subnormals alone are zeros by rule, not by rounding.
    if block.float().abs().max() >= 2.0**-126:
        assert torch.equal(rounded, decode(*encode(block, rule)))


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, SCALE_MAX])
def test_a_given_scale_is_kept_and_rounded_at(scale: int, rng: torch.Generator):
    weight = torch.randn(3, BLOCK, generator=rng) * 2.0 ** (scale - 126)
    scales = torch.full((3, 1), scale, dtype=torch.uint8)
    blocks, kept = encode_with(weight, scales)
    assert torch.equal(kept, scales)
    codes = [[code_of(Fraction(v), scale) for v in values] for values in weight.tolist()]
    assert nibbles(blocks).tolist() == codes


def test_scales_of_another_weight_are_refused():
    for scales in (torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 1)):
        with pytest.raises(InputError, match=r"do not belong to a weight \[2, 32\].*one a block of 32"):
            encode_with(torch.ones(2, 32), scales)

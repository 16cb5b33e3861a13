"""MXFP4 as tensors: E2M1 elements in blocks of 32 along the input dimension, each block with an E8M0 scale.

Canonical form, the one used everywhere inside specqd:

    blocks  uint8 [..., N, K/2]    two codes a byte: column 2j in the low nibble, column 2j+1 in the high one
    scales  uint8 [..., N, K/32]   E8M0: the block's elements are multiplied by 2^(byte - 127); 255 is NaN

Element codes 0 to 7 are the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.
Source: OCP Microscaling Formats (MX) v1.0, sections 5.2, 5.3.3, 5.4.1 and 6.3.
"""

from __future__ import annotations

import math
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from specqd.errors import InputError

ScaleRule = Literal["floor", "even", "rceil", "search"]
SCALE_RULES: Final[tuple[str, ...]] = get_args(ScaleRule)

BLOCK: Final = 32
SCALE_NAN: Final = 255
SCALE_MAX: Final = 252
"""Largest scale byte `choose_scales` gives: with a larger one the element 6 is beyond float32."""

_LARGEST_ELEMENT_EXPONENT: Final = 2  # 6 = 1.5 * 2^2
_SMALLEST_NORMAL: Final = 1 << 23  # bits of 2^-126
_INFINITY: Final = 255 << 23
_NORMAL: Final = 2.0**-126

# Added to the bits of the block's maximum, this carries into the exponent when the mantissa is large enough.
_CARRY: Final[dict[str, int]] = {
    "floor": 0,  # never
    "even": 0x200000,  # from 1.75, where the maximum rounds to 2 in E2M1's one mantissa bit
    "rceil": 0x3FFFFF,  # above 1.5, where the maximum would be over 6 and saturate
    "search": 0,  # the centre of the three exponents tried
}

# One step of work, in elements: it bounds the temporaries to some 40 MB for any matrix. Smaller steps fit the
# cache but meet torch's thread barrier more often, which costs seconds when another process holds a core.
_CHUNK: Final = 1 << 20


class MXFP4(NamedTuple):
    """A matrix, or a stack of them, in the canonical form.

    Attributes:
        blocks: uint8 [..., N, K/2], two element codes a byte, the first in the low nibble.
        scales: uint8 [..., N, K/32], E8M0.
    """

    blocks: Tensor
    scales: Tensor


def encode(weight: Tensor, rule: ScaleRule = "floor") -> MXFP4:
    """Cast a weight to MXFP4: `choose_scales`, then `encode_with` these scales.

    The result depends only on the block's values: not on other rows, the number of threads or the machine.
    Casting a decoded cast again gives the same values, and but for `rceil` the same bytes.

    Args:
        weight: bfloat16, float16 or float32 [..., N, K], K a multiple of 32, in any memory order.
        rule: how the scale is chosen.

    Raises:
        InputError: K is not a multiple of 32, the dtype is not one of the three, or the rule is unknown.
    """
    return encode_with(weight, choose_scales(weight, rule))


def choose_scales(weight: Tensor, rule: ScaleRule = "floor") -> Tensor:
    """Choose the scale bytes of a weight's blocks, uint8 [..., N, K/32].

    The rules choose the scale's exponent from the block's largest magnitude m (after MX v1.0, 6.3):

    - `floor`: floor(log2 m) - 2. The paper's and OCP's choice; maxima between 6 and 8 scales saturate.
    - `even`: the same after rounding m to one mantissa bit, so one higher from m = 1.75 * 2^e on
      (compressed-tensors).
    - `rceil`: ceil(log2(m / 6)), the smallest exponent at which nothing saturates (torchao's RCEIL, exact).
    - `search`: the least squared error among floor - 1, floor and floor + 1; ties go to the lower exponent.

    Cases common to all rules:

    1. A block with a NaN or infinity has scale 255.
    2. A block whose m is zero or a float32 subnormal has scale 0, as in the paper's code.
    3. The scale byte is clamped to 0..SCALE_MAX, so a finite weight never decodes to an infinity.

    Args and errors are those of `encode`.
    """
    if rule not in SCALE_RULES:
        raise InputError(f"there is no MXFP4 scale rule {rule!r}; choose one of {', '.join(SCALE_RULES)}")
    _check_weight(weight)
    *lead, k = weight.shape
    scales = torch.empty((math.prod(lead), k // BLOCK), dtype=torch.uint8, device=weight.device)
    for part, scale in zip(_rows(weight), scales.split(_rows_a_step(k)), strict=True):
        scale.copy_(_choose(part.float().reshape(*scale.shape, BLOCK).abs(), rule))
    return scales.reshape(*lead, k // BLOCK)


def encode_with(weight: Tensor, scales: Tensor) -> MXFP4:
    """Cast a weight to MXFP4 at given scales, rounding to nearest with ties to the even code, saturating at 6.

    1. The elements of a block whose scale is 255 are 0.
    2. A block whose largest magnitude is zero or a float32 subnormal becomes zeros.
    3. A zero element is always +0 (code 0), also where a negative value was rounded away.

    Args:
        weight: as in `encode`, finite but for blocks whose scale is 255.
        scales: uint8 [..., N, K/32] as `choose_scales` gives them: 0..SCALE_MAX, or 255.

    Raises:
        InputError: as `encode`, or the scales do not belong to the weight.
    """
    _check_weight(weight)
    *lead, k = weight.shape
    if scales.dtype != torch.uint8 or list(scales.shape) != [*lead, k // BLOCK]:
        raise InputError(
            f"scales {scales.dtype} {list(scales.shape)} do not belong to a weight {list(weight.shape)}; "
            f"give uint8, one a block of {BLOCK}"
        )
    flat = scales.reshape(math.prod(lead), k // BLOCK)
    blocks = torch.empty((len(flat), k // 2), dtype=torch.uint8, device=weight.device)
    step = _rows_a_step(k)
    for part, scale, codes in zip(_rows(weight), flat.split(step), blocks.split(step), strict=True):
        codes.copy_(_encode_rows(part.float().reshape(*scale.shape, BLOCK), scale).view(codes.shape))
    return MXFP4(blocks.reshape(*lead, k // 2), scales)


def nearest(values: Tensor, scales: Tensor) -> Tensor:
    """Round float32 `values` to what MXFP4 holds at the scale bytes `scales` (uint8, 0..SCALE_MAX, broadcast).

    A zero may be negative here; otherwise these are the values that `encode_with` writes and `decode` reads.
    """
    codes = _round(values.abs() * _reciprocal(scales.int()))
    return torch.copysign(_magnitude(codes) * scales.view(torch.float8_e8m0fnu).float(), values)


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Give the values of a matrix in canonical form, as float32 [..., N, K].

    Every code times every scale is exact in float32, subnormals included, except that scale bytes 253 and 254
    overflow to an infinity for the largest elements. Scale byte 255 gives NaN for the whole block.

    Raises:
        InputError: the tensors are not uint8, or their shapes do not belong together.
    """
    check(blocks, scales)
    *lead, packed = blocks.shape
    values = torch.empty((*lead, 2 * packed), dtype=torch.float32, device=blocks.device)
    if not values.numel():
        return values
    table = _pairs().to(blocks.device)
    step = _rows_a_step(2 * packed)
    by_row = (
        blocks.reshape(-1, packed),
        scales.reshape(-1, packed * 2 // BLOCK),
        values.view(-1, 2 * packed),
    )
    for codes, scale, out in zip(*(tensor.split(step) for tensor in by_row), strict=True):
        elements = table.index_select(0, codes.int().flatten()).view(*scale.shape, BLOCK)
        factor = scale.view(torch.float8_e8m0fnu).float()
        torch.mul(elements, factor.unsqueeze(-1), out=out.view(elements.shape))
    return values


def check(blocks: Tensor, scales: Tensor) -> None:
    """Refuse a pair of tensors that is no matrix in canonical form.

    Raises:
        InputError: the tensors are not uint8, or their shapes do not belong together.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise InputError(
            f"MXFP4 blocks and scales are uint8, not {blocks.dtype} and {scales.dtype}; view them as uint8"
        )
    if not scales.ndim or blocks.shape != (*scales.shape[:-1], scales.shape[-1] * BLOCK // 2):
        raise InputError(
            f"MXFP4 blocks {list(blocks.shape)} and scales {list(scales.shape)} do not belong together; "
            f"a scale covers {BLOCK // 2} bytes of blocks in the last dimension"
        )


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(
            f"MXFP4 cannot be cast from {weight.dtype}; give a bfloat16, float16 or float32 weight"
        )
    if weight.ndim == 0 or weight.shape[-1] % BLOCK:
        raise InputError(
            f"MXFP4 needs an input dimension in blocks of {BLOCK}, but the weight is {list(weight.shape)}; "
            "pad its columns or leave it uncast"
        )


def _rows(weight: Tensor) -> tuple[Tensor, ...]:
    *lead, k = weight.shape
    return weight.detach().reshape(math.prod(lead), k).split(_rows_a_step(k))


def _rows_a_step(k: int) -> int:
    return max(1, _CHUNK // max(1, k))


def _choose(magnitudes: Tensor, rule: ScaleRule) -> Tensor:
    """Return the scale bytes of blocks with `magnitudes` [n, K/32, 32], as int32 [n, K/32]."""
    if not magnitudes.numel():
        return magnitudes.new_zeros(magnitudes.shape[:-1], dtype=torch.int32)
    bits = magnitudes.amax(-1).view(torch.int32)
    scale = _clamp(((bits + _CARRY[rule]) >> 23) - _LARGEST_ELEMENT_EXPONENT)
    if rule == "search":
        scale = _least_error(magnitudes, scale)
    return scale.masked_fill(bits < _SMALLEST_NORMAL, 0).masked_fill(bits >= _INFINITY, SCALE_NAN)


def _encode_rows(values: Tensor, scales: Tensor) -> Tensor:
    """Cast `values` [n, K/32, 32] to blocks, uint8 [n, K/32, 16], at `scales` uint8 [n, K/32]."""
    magnitudes = values.abs()
    codes = _round(magnitudes * _reciprocal(_clamp(scales.int())).unsqueeze(-1)).to(torch.uint8)
    codes |= ((values < 0) & (codes > 0)).to(torch.uint8) << 3
    tiny = (magnitudes < _NORMAL).all(-1)
    codes.masked_fill_((tiny | (scales == SCALE_NAN)).unsqueeze(-1), 0)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _least_error(magnitudes: Tensor, floor: Tensor) -> Tensor:
    """Return the best of the scale bytes floor - 1, floor and floor + 1 for `magnitudes` [n, K/32, 32].

    Lower exponents come first and are kept on a tie. That makes the choice canonical: all values up to 3 at
    one exponent exist at the one below too, so what is written has a 4 or a 6 and is encoded the same again.
    """
    best = _clamp(floor - 1)
    least = _squared_error(magnitudes, floor, best)
    for scale in (floor, _clamp(floor + 1)):
        error = _squared_error(magnitudes, floor, scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _squared_error(magnitudes: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """Return each block's squared error at `scale`, as float64 in units of the scale byte `unit`."""
    ratio = torch.exp2((scale - unit).float()).unsqueeze(-1)
    codes = _round(magnitudes * _reciprocal(scale).unsqueeze(-1))
    error = (magnitudes * _reciprocal(unit).unsqueeze(-1)).double() - _magnitude(codes) * ratio
    error.square_()
    # Not sum(): its order, and with it the choice between two nearly equal scales, differs between CPUs.
    for half in (16, 8, 4, 2, 1):
        error = error[..., :half] + error[..., half:]
    return error.squeeze(-1)


def _round(x: Tensor) -> Tensor:
    """Round `x` >= 0 to an E2M1 code (as float32), to nearest with ties to the even code, saturating at 7.

    The code as a function of the value is a concave line of three pieces, of slope 2 up to 2, 1 up to 4 and
    1/2 beyond, so it is the least of the three. Each is rounded before its offset is added, hence exactly.
    """
    x = x.clamp(max=8)
    code = torch.minimum(_whole(x * 2), _whole(x.clone()).add_(2))
    return torch.minimum(code, _whole(x * 0.5).add_(4)).clamp_(max=7)


def _whole(x: Tensor) -> Tensor:
    """Round 0 <= `x` <= 2^22 in place to a whole number, ties to even: floats from 2^23 on have no fractions.

    Tensor.round starts all threads even for a row of a matrix, and is ten times as slow there.
    """
    return x.add_(2.0**23).sub_(2.0**23)


def _magnitude(codes: Tensor) -> Tensor:
    """Return the values of the codes 0 to 7: a convex line of three pieces, hence the greatest of the three."""
    return torch.maximum(torch.maximum(codes * 0.5, codes - 2), codes * 2 - 8)


def _clamp(scale: Tensor) -> Tensor:
    return scale.clamp(0, SCALE_MAX)


def _reciprocal(scale: Tensor) -> Tensor:
    """Return 2^(127 - scale) as float32: a normal number for every scale up to SCALE_MAX."""
    return ((254 - scale) << 23).view(torch.float32)


def _pairs() -> Tensor:
    """Return the two element values of every byte, float32 [256, 2], the low nibble's first."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    elements = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256)
    return elements[torch.stack([byte & 15, byte >> 4], dim=1)]

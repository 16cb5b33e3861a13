"""What a key-value cache gives back of what it was given: the table of its formats, and their roundings in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specqd.lloyd_max import borders, magnitudes
from specqd.manifest import BLOCK

__all__ = [
    "FORMATS",
    "KEY_FORMATS",
    "CacheFormat",
    "as_read",
    "held",
    "rotated",
    "rotated_back",
    "signs",
    "tensor_dtype",
]


@dataclass(frozen=True)
class CacheFormat:
    """How a vector, one key or value of a head, is kept.

    `bits` a channel; with every `group` neighbouring channels (0: all of the head) a scale of `scale_bytes` bytes, or
    with every channel one for `positions` neighbouring positions, if that is more than 1. `whole_blocks`: a block is
    only rounded when all its positions are there, and read in BF16 before. `turned`: vectors lie rotated. `rounded`
    takes float32 `[..., positions, channels]` of what lies there to what reading gives; None: a cast to the dtype.
    """

    bits: int
    group: int = 0
    scale_bytes: int = 0
    positions: int = 1
    whole_blocks: bool = False
    turned: bool = False
    rounded: Callable[[Tensor], Tensor] | None = None

    def scales(self, channels: int) -> float:
        """Scales of a vector."""
        if not self.scale_bytes:
            return 0
        return channels / self.positions if self.positions > 1 else -(-channels // (self.group or channels))

    def vector_bytes(self, channels: int) -> int:
        """Bytes of a vector with its scales."""
        return -(-channels * self.bits // 8) + -int(-self.scales(channels) * self.scale_bytes // 1)


def _int8(x: Tensor) -> Tensor:
    """Symmetric INT8; the scale is amax / 127 in BF16, and values are rounded by the scale that is kept.

    A scale of BF16 is off by at most 2^-8, so that quotients end at 127.496 and need no clamp.
    """
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126).bfloat16().float()
    return (x * scale.reciprocal()).round() * scale


def _int4(x: Tensor, dim: int) -> Tensor:
    """Asymmetric INT4 of BF16 values along a dimension, as KIVI (arXiv 2402.02750, section 3).

    The zero point is the least value, exactly; the scale, a fifteenth of the range, is kept in BF16. It is off by at
    most 2^-8, so that quotients end at 15.06 and need no clamp.
    """
    x = x.bfloat16().float()
    low = x.amin(dim, keepdim=True)
    scale = ((x.amax(dim, keepdim=True) - low) / 15).clamp(min=2.0**-126).bfloat16().float()
    return ((x - low) * scale.reciprocal()).round() * scale + low


def _int4_keys(x: Tensor) -> Tensor:
    """Round each channel over a block; one that is not whole is filled up with its last position."""
    rest = -x.shape[-2] % BLOCK
    whole = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], rest, -1)], -2)
    rounded = _int4(whole.unflatten(-2, (-1, BLOCK)), -2).flatten(-3, -2)
    return rounded[..., : x.shape[-2], :]


def _turbo(turned: Tensor, bits: int) -> Tensor:
    """Round each channel of rotated vectors to a level of the normal distribution's quantiser (arXiv 2504.19874).

    Levels are chosen for a vector of the root mean square 1; the scale that they are given back with is the one of
    least squares, in BF16. Sums are of exact products in float64, so that their order is not seen.
    """
    sizes = turned.abs()
    size = (sizes.double().square().sum(-1, keepdim=True) / turned.shape[-1]).sqrt()
    inverse = size.clamp(min=2.0**-126).reciprocal().float()
    levels = torch.tensor(magnitudes(bits))[torch.bucketize(sizes * inverse, torch.tensor(borders(bits)))]
    wide = levels.double()
    fitted = (wide * sizes).sum(-1, keepdim=True) / wide.square().sum(-1, keepdim=True)
    return (levels * fitted.float().bfloat16().float()).copysign(turned)


def _turbo_format(bits: int) -> CacheFormat:
    return CacheFormat(bits, scale_bytes=2, turned=True, rounded=lambda x: _turbo(x, bits))


FORMATS: dict[str, CacheFormat] = {
    "float32": CacheFormat(32),
    "bfloat16": CacheFormat(16),
    "int8": CacheFormat(8, scale_bytes=2, rounded=_int8),
    "int4": CacheFormat(4, scale_bytes=4, whole_blocks=True, rounded=lambda x: _int4(x, -1)),
    **{f"turbo{bits}": _turbo_format(bits) for bits in (3, 4, 5)},
}
"""Formats by the name that caches give them, as they are of values."""

KEY_FORMATS: dict[str, CacheFormat] = FORMATS | {
    "int4": CacheFormat(4, scale_bytes=4, positions=BLOCK, whole_blocks=True, rounded=_int4_keys),
}
"""The same of keys, whose channels differ more than their positions do."""


def held(x: Tensor, dtype: str, *, keys: bool = False) -> Tensor:
    """Return float32 `[..., positions, channels]`, from a block's begin on, as a cache of that format gives it back."""
    turned = FORMATS[dtype].turned
    got = as_read(rotated(x.float()) if turned else x, dtype, keys=keys)
    return rotated_back(got) if turned else got


def as_read(x: Tensor, dtype: str, *, keys: bool = False) -> Tensor:
    """Return what reading a cache of that format gives of `x`, which lies there: rotated, if the format says so."""
    rounded = (KEY_FORMATS if keys else FORMATS)[dtype].rounded
    return x.to(getattr(torch, dtype)).float() if rounded is None else rounded(x.float())


def tensor_dtype(dtype: str) -> torch.dtype:
    """The dtype of a reference cache of that format: quantised ones keep what they give back, in float32."""
    return torch.float32 if FORMATS[dtype].rounded else getattr(torch, dtype)


def signs(channels: int) -> tuple[int, ...]:
    """Random signs of so many channels, the same always: a bit each, set for a minus, 32 in an int32."""
    drawn = torch.randint(-(2**31), 2**31, (-(-channels // 32),), generator=torch.Generator().manual_seed(0))
    return tuple(drawn.tolist())


def rotated(x: Tensor) -> Tensor:
    """Rotate float32 `[..., channels]` at random: signs, then a Hadamard transform (TurboQuant, arXiv 2504.19874).

    What stands out in a channel is spread over as many as the largest power of two that divides their number.
    """
    return _hadamard(x * _signs(x))


def rotated_back(x: Tensor) -> Tensor:
    """Undo `rotated`."""
    return _hadamard(x) * _signs(x)


def _signs(x: Tensor) -> Tensor:
    bits = torch.tensor(signs(x.shape[-1]))[:, None] >> torch.arange(32) & 1
    return 1.0 - 2.0 * bits.flatten()[: x.shape[-1]].to(x.dtype)


def _hadamard(x: Tensor) -> Tensor:
    channels = x.shape[-1]
    size = channels & -channels
    step = 1
    while step < size:
        a, b = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    return x * size**-0.5

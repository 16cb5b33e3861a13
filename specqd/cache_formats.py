"""What a key-value cache gives back of what it was given: the table of its formats, and their roundings in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "CacheFormat", "held", "tensor_dtype"]


@dataclass(frozen=True)
class CacheFormat:
    """How a vector, one key or value of a head, is kept.

    `bits` a channel; with every `group` neighbouring channels (0: all of the head) a scale of `scale_bytes` bytes.
    `rounded` takes float32 `[..., channels]` to what reading the cache gives; None: a cast to the dtype of that name.
    """

    bits: int
    group: int = 0
    scale_bytes: int = 0
    rounded: Callable[[Tensor], Tensor] | None = None

    def scales(self, channels: int) -> int:
        """Scales of a vector."""
        return -(-channels // (self.group or channels)) if self.scale_bytes else 0

    def vector_bytes(self, channels: int) -> int:
        """Bytes of a vector with its scales."""
        return -(-channels * self.bits // 8) + self.scales(channels) * self.scale_bytes


def _int8(x: Tensor) -> Tensor:
    """Symmetric INT8; the scale is amax / 127 in BF16, and values are rounded by the scale that is kept.

    A scale of BF16 is off by at most 2^-8, so that quotients end at 127.496 and need no clamp.
    """
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-126).bfloat16().float()
    return (x * scale.reciprocal()).round() * scale


FORMATS: dict[str, CacheFormat] = {
    "float32": CacheFormat(32),
    "bfloat16": CacheFormat(16),
    "int8": CacheFormat(8, scale_bytes=2, rounded=_int8),
}
"""Formats by the name that caches give them."""


def held(x: Tensor, dtype: str) -> Tensor:
    """Return float32 `[..., channels]` as a cache of that format gives it back."""
    rounded = FORMATS[dtype].rounded
    return x.to(getattr(torch, dtype)).float() if rounded is None else rounded(x.float())


def tensor_dtype(dtype: str) -> torch.dtype:
    """The dtype of a reference cache of that format: quantised ones keep what they give back, in float32."""
    return torch.float32 if FORMATS[dtype].rounded else getattr(torch, dtype)

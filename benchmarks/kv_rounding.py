"""Caches rounded to few bits and back: what a cache of that format would hold, for its quality only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from kv_model import Layer
from torch import Tensor

from specqd.cache_formats import FORMATS as CACHE_FORMATS
from specqd.cache_formats import held

__all__ = ["FORMATS", "Format"]

_GROUP = 32  # tokens that share a scale and zero point in each channel of 4-bit keys


@dataclass(frozen=True)
class Format:
    """A way to store a cache. `bits` of an element of keys and values on average, scales included."""

    bits: Callable[[int], float]
    round: Callable[[Layer], Layer]


def _held(keys: str, values: str) -> Format:
    """Keys and values as compiled code keeps them, in formats that round each position alone."""
    return Format(
        lambda dim: sum(CACHE_FORMATS[name].vector_bytes(dim) for name in (keys, values)) * 4 / dim,
        lambda layer: Layer(held(layer.keys, keys), held(layer.values, values)),
    )


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _asymmetric4(x: Tensor, dim: int) -> Tensor:
    """Round to 16 steps along `dim`, with BF16 scale and zero point."""
    low = _bf16(x.amin(dim=dim, keepdim=True))
    scale = _bf16((x.amax(dim=dim, keepdim=True) - low) / 15).clamp(min=1e-12)
    return ((x - low) / scale).round().clamp(0, 15) * scale + low


def _keys4(x: Tensor) -> Tensor:
    """Round keys for each channel over groups of tokens; the last, partial group stays as it is (KIVI)."""
    heads, length, dim = x.shape
    whole = length // _GROUP * _GROUP
    groups = x[:, :whole].reshape(heads, -1, _GROUP, dim)
    return torch.cat([_asymmetric4(groups, 2).reshape(heads, whole, dim), x[:, whole:]], dim=1)


# By format, with the bits of scales and zero points spread over the elements of a head of D dimensions.
FORMATS: Mapping[str, Format] = {
    "bf16": Format(lambda dim: 16, lambda layer: layer),
    "int8": _held("int8", "int8"),
    "int4": Format(
        lambda dim: 4 + (32 / _GROUP + 32 / dim) / 2,
        lambda layer: Layer(_keys4(layer.keys), _asymmetric4(layer.values, 2)),
    ),
    **{
        f"turbo{keys} keys, turbo{values} values": _held(f"turbo{keys}", f"turbo{values}")
        for keys, values in ((4, 3), (4, 4), (5, 3))
    },
}

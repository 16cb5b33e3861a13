"""Caches rounded to few bits and back: what a cache of that format would hold, for its quality only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from kv_model import Layer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.cache_formats import FORMATS as CACHE_FORMATS
from specqd.cache_formats import held
from specqd.passes.quantize.mxfp4 import decode, encode

__all__ = ["FORMATS", "Format"]

_GROUP = 32  # tokens that share a scale in each channel of 4-bit keys


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


def _by_channel(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Round each channel over groups of tokens, `[..., tokens]`; the last, partial group stays as it is (KIVI)."""
    heads, length, dim = x.shape
    whole = length // _GROUP * _GROUP
    groups = rounded(x[:, :whole].reshape(heads, -1, _GROUP, dim).transpose(2, 3))
    return torch.cat([groups.transpose(2, 3).reshape(heads, whole, dim), x[:, whole:]], dim=1)


def _mxfp4(x: Tensor) -> Tensor:
    """Cast blocks of 32 along the last dimension, with the scale of the least error."""
    return decode(*encode(F.pad(x, (0, -x.shape[-1] % 32)), "search"))[..., : x.shape[-1]]


# By format, with the bits of scales and zero points spread over the elements of a head of D dimensions.
FORMATS: Mapping[str, Format] = {
    "bf16": Format(lambda dim: 16, lambda layer: layer),
    "int8": _held("int8", "int8"),
    "int4": Format(
        lambda dim: 4 + (32 / _GROUP + 32 / dim) / 2,
        lambda layer: Layer(
            _by_channel(layer.keys, lambda x: _asymmetric4(x, -1)), _asymmetric4(layer.values, -1)
        ),
    ),
    "mxfp4": Format(
        lambda dim: 4 + 8 / 32, lambda layer: Layer(_by_channel(layer.keys, _mxfp4), _mxfp4(layer.values))
    ),
    **{
        f"turbo{keys} keys, turbo{values} values": _held(f"turbo{keys}", f"turbo{values}")
        for keys, values in ((4, 3), (4, 4), (5, 3))
    },
}

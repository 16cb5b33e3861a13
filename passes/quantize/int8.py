"""Symmetric INT8 as tensors: one float32 scale a row (output channel), integers in [-127, 127]."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from specqd.errors import InputError

_LARGEST: Final = 127

# One step of work, in elements: it bounds the temporaries to some 10 MB whatever the matrix.
_CHUNK: Final = 1 << 20


class INT8(NamedTuple):
    """A matrix, or a stack of them, in symmetric INT8.

    Attributes:
        values: int8 [..., N, K] in [-127, 127].
        scales: float32 [..., N]; the weight is values * scales.
    """

    values: Tensor
    scales: Tensor


def encode(weight: Tensor) -> INT8:
    """Cast a weight to INT8, scale = max |row| / 127, rounding to nearest with ties to even.

    1. A NaN or infinity makes its row NaN: scale NaN, values 0 (INT8 itself has no NaN).
    2. A row of zeros, or one so small that its scale would be a float32 subnormal, has scale 0 and values 0.

    Args:
        weight: bfloat16, float16 or float32 [..., N, K], in any memory order.

    Raises:
        InputError: the weight is not a matrix, or not of one of the three dtypes.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(
            f"INT8 cannot be cast from {weight.dtype}; give a bfloat16, float16 or float32 weight"
        )
    if weight.ndim < 2:
        raise InputError(
            f"INT8 needs a matrix [N, K], but the weight is {list(weight.shape)}; leave it uncast"
        )
    *lead, k = weight.shape
    values = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.zeros(lead, dtype=torch.float32, device=weight.device)
    if not values.numel():
        return INT8(values, scales)
    step = max(1, _CHUNK // k)
    by_row = (weight.detach().reshape(-1, k), values.view(-1, k), scales.view(-1))
    for part, integers, scale in zip(*(tensor.split(step) for tensor in by_row), strict=True):
        _encode_rows(part.float(), integers, scale)
    return INT8(values, scales)


def decode(values: Tensor, scales: Tensor) -> Tensor:
    """Give the weight as float32 [..., N, K]: values * scales.

    Raises:
        InputError: the tensors are not int8 and float32, or their shapes do not belong together.
    """
    if values.dtype != torch.int8 or scales.dtype != torch.float32:
        raise InputError(
            f"INT8 values and scales are int8 and float32, not {values.dtype} and {scales.dtype}"
        )
    if values.ndim == 0 or values.shape[:-1] != scales.shape:
        raise InputError(
            f"INT8 values {list(values.shape)} and scales {list(scales.shape)} do not belong together; "
            "give one scale a row"
        )
    return values * scales.unsqueeze(-1)


def _encode_rows(weight: Tensor, values: Tensor, scales: Tensor) -> None:
    """Cast `weight` [n, K] into the outputs `values` [n, K] and `scales` [n]."""
    scale = weight.abs().amax(-1) / _LARGEST
    nan = ~torch.isfinite(scale)
    zero = scale < torch.finfo(torch.float32).tiny
    # The quotient is at most 127 * (1 + 2^-23), so rounding it needs no clamp.
    integers = (weight / scale.masked_fill(zero, 1).unsqueeze(-1)).round_()
    values.copy_(integers.masked_fill_((nan | zero).unsqueeze(-1), 0))
    scales.copy_(scale.masked_fill(zero, 0).masked_fill(nan, torch.nan))

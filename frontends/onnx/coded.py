"""Types of ONNX that are not compiled, and how they are held.

Floats of 8 and 4 bits and integers of 4 and 2 are held as one byte each, and computed with after they are decoded.
BFLOAT16 and large unsigned integers are held, and computed with, in the next wider type.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor

__all__ = ["CODES", "INTEGERS", "Coded", "decode", "encode", "is_coded", "is_wide", "kept"]


@dataclass(frozen=True)
class Coded:
    """A tensor of such a type: uint8 codes of small floats, or the numbers themselves."""

    codes: Tensor
    type: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.codes.shape


_FLOATS = (
    TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ,
    TensorProto.FLOAT4E2M1,
)  # fmt: skip
INTEGERS = {
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3),
}
"""Ranges of the small integers."""
_WIDE = {
    TensorProto.UINT16: (torch.int32, 16),
    TensorProto.UINT32: (torch.int64, 32),
    TensorProto.UINT64: (torch.int64, 64),
    TensorProto.BFLOAT16: (torch.float32, 16),
}
CODES = {
    **{kind: dtype for kind, (dtype, _) in _WIDE.items()},
    **dict.fromkeys((*_FLOATS, TensorProto.FLOAT8E8M0), torch.uint8),
    **{kind: torch.int8 if low < 0 else torch.uint8 for kind, (low, _) in INTEGERS.items()},
}
"""The dtype that holds each type."""


def is_coded(kind: int) -> bool:
    """Whether a type is held as codes."""
    return kind in CODES


def is_wide(kind: int) -> bool:
    """Whether a type is computed with as it is held."""
    return kind in _WIDE


def kept(x: Tensor, kind: int) -> Coded:
    """Hold what was computed of numbers of a wide type; unsigned integers wrap around.

    Numbers of BFLOAT16 are rounded to it where a model casts to it, and keep float32's digits from there on.
    """
    dtype, bits = _WIDE[kind]
    whole = x.to(dtype)
    return Coded(whole if kind == TensorProto.BFLOAT16 or bits == 64 else whole & ((1 << bits) - 1), kind)


@functools.cache
def _values(kind: int) -> tuple[float, ...]:
    """What each code of a float type stands for; those without a sign come first."""
    codes = np.arange(16 if kind == TensorProto.FLOAT4E2M1 else 256, dtype=np.uint8)
    return tuple(codes.view(helper.tensor_dtype_to_np_dtype(kind)).astype(np.float32).tolist())


def _code(value: float, kind: int) -> int:
    return int(np.array([value], np.float32).astype(helper.tensor_dtype_to_np_dtype(kind)).view(np.uint8)[0])


def decode(x: Coded, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers that the codes stand for; exact in float32."""
    if x.type in INTEGERS or x.type in _WIDE:
        return x.codes.to(dtype)
    table = torch.tensor(_values(x.type), dtype=torch.float32)
    return table[x.codes.long()].to(dtype)


def encode(x: Tensor, kind: int, *, saturate: bool = True, mode: str = "nearest") -> Coded:
    """Round numbers to a type, as the operator Cast does.

    Integers wrap around; floats go to the nearest code, ties to the even one. What is too large becomes the largest
    number with `saturate`, else infinity or NaN. `mode` is how FLOAT8E8M0 rounds: up, down or nearest.
    """
    if kind in INTEGERS:
        low, high = INTEGERS[kind]
        whole = x if not x.is_floating_point() else x.trunc()
        wrapped = torch.remainder(whole.long() - low, high - low + 1) + low
        return Coded(wrapped.to(CODES[kind]), kind)
    if kind == TensorProto.BFLOAT16:
        return Coded(x.float().bfloat16().float(), kind)
    if kind in _WIDE:
        return kept(x.trunc().long() if x.is_floating_point() else x, kind)
    x = x.float()
    if kind == TensorProto.FLOAT8E8M0:
        return Coded(_scales(x, mode, saturate), kind)
    return Coded(_nearest(x, kind, saturate), kind)


def _nearest(x: Tensor, kind: int, saturate: bool) -> Tensor:
    count = len(_values(kind)) // 2
    finite = [value for value in _values(kind)[:count] if math.isfinite(value)]
    largest = len(finite) - 1
    beyond = 2 * finite[-1] - finite[-2]  # the code that would come next
    magnitude = x.abs()
    ends = list(zip(finite, [*finite[1:], *([] if saturate else [beyond])], strict=False))
    # A code is the number of midpoints below; a tie goes up where the code below is odd.
    middles = [((a + b) / 2, at % 2 == 1) for at, (a, b) in enumerate(ends)]
    code = torch.zeros(x.shape, dtype=torch.int32)
    for up in (False, True):
        marks = torch.tensor([middle for middle, odd in middles if odd is up], dtype=torch.float32)
        above = magnitude[..., None] >= marks if up else magnitude[..., None] > marks
        code = code + above.sum(-1, dtype=torch.int32)
    nan = _code(math.nan, kind)
    if not saturate:
        code = torch.where(code > largest, _code(math.inf, kind), code)
    negative = (x < 0) | ((x == 0) & (torch.copysign(torch.ones_like(x), x) < 0))
    if math.isnan(_values(kind)[count]):  # there is no -0, and its code is NaN
        negative = negative & (code > 0) & (code != nan)
    code = torch.where(negative, code + count, code)
    return torch.where(x.isnan(), nan, code).to(torch.uint8)


def _scales(x: Tensor, mode: str, saturate: bool) -> Tensor:
    """Powers of two between 2**-127 and 2**127."""
    marks = _values(TensorProto.FLOAT8E8M0)[:-1]
    thresholds = {"nearest": [m * 1.5 for m in marks[:-1]], "down": marks[1:], "up": marks[:-1]}[mode]
    bounds = torch.tensor(thresholds, dtype=torch.float32)
    magnitude = x.abs()[..., None]
    above = magnitude > bounds if mode == "up" else magnitude >= bounds
    code = above.sum(-1, dtype=torch.int32)
    if not saturate:
        code = torch.where(x.abs() > marks[-1], 255, code)
    return torch.where(x.isnan(), 255, code).to(torch.uint8)

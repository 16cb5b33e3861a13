"""Affine INT8 of activations as numbers: `x ~ (code - zero) * scale`, one scale and zero point a tensor."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Affine", "affine"]

quantized = torch.ops.quantized_decomposed


class Affine(NamedTuple):
    """How a tensor is quantised: `clamp(round(x / scale) + zero, low, high)`, ties to even.

    This is QuantizeLinear of ONNX. `scale` is a float32 number, `dtype` torch.uint8 or torch.int8.
    """

    scale: float
    zero: int
    low: int
    high: int
    dtype: torch.dtype

    def rounded(self, x: Tensor) -> Tensor:
        """Quantise a float32 tensor of any shape and turn it back."""
        codes = quantized.quantize_per_tensor(x, *self)
        return quantized.dequantize_per_tensor(codes, *self)


def affine(least: float, most: float, *, symmetric: bool) -> Affine:
    """Return what represents `[least, most]`, and 0 exactly: int8 around 0 if symmetric, else uint8.

    A range of zeros gets a scale of 1.
    """
    least, most = min(least, 0.0), max(most, 0.0)
    scale = float(np.float32(max(-least, most) / 127 if symmetric else (most - least) / 255))
    # A subnormal scale has no reciprocal in float32, which kernels multiply by.
    scale = scale if scale >= np.finfo(np.float32).tiny * 4 else 1.0
    if symmetric:
        return Affine(scale, 0, -128, 127, torch.int8)
    return Affine(scale, min(max(round(-least / scale), 0), 255), 0, 255, torch.uint8)

"""Fourier transforms, as products with tables of waves, and what goes with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.tensors import dtype_of
from specqd.frontends.onnx.values import single

__all__: list[str] = []

_LONGEST = 8192


def _waves(node: Node, length: int, bins: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[bins, length]` of a transform."""
    if length > _LONGEST:
        raise CaptureError(f"{node}: transforms of more than {_LONGEST} elements are not compiled")
    with _disable_current_modes():
        turns = torch.outer(torch.arange(bins), torch.arange(length)) % length
        angles = turns.double() * (2 * math.pi / length)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _transformed(node: Node, x: Tensor, length: int, axis: int, inverse: bool, onesided: bool) -> Tensor:
    """Transform `x [..., 1 or 2]` along an axis; the last holds real and imaginary parts."""
    x = x.transpose(axis, -2)
    have = x.shape[-2]
    x = x.narrow(-2, 0, length) if length < have else torch.nn.functional.pad(x, [0, 0, 0, length - have])
    bins = length // 2 + 1 if onesided and not inverse else length
    if inverse and onesided:
        if x.shape[-1] == 1:
            raise CaptureError(f"{node}: a one-sided inverse transform takes complex numbers")
        return _real_inverse(node, x, length).transpose(axis, -2)
    cosines, sines = _waves(node, length, bins, x.dtype)
    real = torch.matmul(cosines, x[..., 0, None])[..., 0]
    sign = 1 if inverse else -1
    imaginary = sign * torch.matmul(sines, x[..., 0, None])[..., 0]
    if x.shape[-1] == 2:
        real = real - sign * torch.matmul(sines, x[..., 1, None])[..., 0]
        imaginary = imaginary + torch.matmul(cosines, x[..., 1, None])[..., 0]
    found = torch.stack([real, imaginary], -1)
    return (found / length if inverse else found).transpose(axis, -2)


def _real_inverse(node: Node, x: Tensor, length: int) -> Tensor:
    """The real numbers whose transform begins as `x` does."""
    bins = length // 2 + 1
    cosines, sines = _waves(node, length, bins, x.dtype)
    with _disable_current_modes():
        weight = torch.full((bins, 1), 2.0, dtype=x.dtype)
        weight[0] = 1.0
        if length % 2 == 0:
            weight[-1] = 1.0
        cosines, sines = (cosines * weight).T / length, (sines * weight).T / length
    x = x.narrow(-2, 0, bins)
    real = torch.matmul(cosines.contiguous(), x[..., 0, None]) - torch.matmul(
        sines.contiguous(), x[..., 1, None]
    )
    return real


@rule("DFT", since=17, plain=(1,))
def _dft_17(
    node: Node, x: Tensor, length: Any = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    return _dft(node, x, length, axis, inverse=inverse, onesided=onesided)


@rule("DFT", since=20, plain=(1, 2))
def _dft(
    node: Node, x: Tensor, length: Any = None, axis: Any = -2, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    axis = -2 if axis is None else single(axis)
    length = single(length)
    have = x.shape[axis]
    count = length if length is not None else 2 * (have - 1) if inverse and onesided else have
    if not isinstance(count, int):
        raise CaptureError(f"{node}: the length that it transforms is left open; fix it with dynamic_shapes")
    return _transformed(node, x, count, axis % x.dim(), bool(inverse), bool(onesided))


@rule("STFT", plain=(1, 3))
def _stft(
    node: Node, x: Tensor, step: Any, window: Tensor | None = None, length: Any = None, *, onesided: int = 1
) -> Tensor:
    """Transform windows of `x [batch, time, 1 or 2]`, `step` apart."""
    step = single(step)
    length = single(length)
    size = length if length is not None else window.shape[0] if window is not None else None
    if not isinstance(size, int):
        raise CaptureError(f"{node}: it has neither a window nor a frame length")
    frames = x.unfold(1, size, step).transpose(-1, -2)  # [batch, frames, size, parts]
    if window is not None:
        frames = frames * window[:, None]
    return _transformed(node, frames, size, 2, False, bool(onesided))


@rule("MelWeightMatrix", plain=(0, 1, 2, 3, 4))
def _mel(
    node: Node, bands: Any, length: Any, rate: Any, low: Any, high: Any, *, output_datatype: int = 1
) -> Tensor:
    """Triangles on the mel scale, as ONNX places them: by whole bins."""
    bands, length, rate, low, high = (single(v) for v in (bands, length, rate, low, high))
    if max(bands, length) > _LONGEST:
        raise CaptureError(f"{node}: more than {_LONGEST} bands or elements are not compiled")
    mel_low, mel_high = (2595 * math.log10(1 + hz / 700) for hz in (low, high))
    step = (mel_high - mel_low) / (bands + 2)
    bins = length // 2 + 1
    with _disable_current_modes():
        edges = torch.arange(bands + 2, dtype=torch.float32) * step + mel_low
        hertz = 700 * (torch.pow(torch.full((), 10.0), edges / 2595) - 1)
        marks = ((length + 1) * hertz / rate).floor().long().tolist()
        table = torch.zeros(bins, bands)
        for band in range(bands):
            left, middle, right = marks[band : band + 3]
            for at in range(left, middle):
                table[at, band] = (at - left) / (middle - left)
            table[middle, band] = 1
            for at in range(middle, right):
                table[at, band] = (right - at) / (right - middle)
        return table.to(dtype_of(output_datatype, node))

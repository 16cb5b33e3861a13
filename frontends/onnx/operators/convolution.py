"""Convolutions, and how their windows lie."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__ = ["around", "convolved", "padded"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def around(
    node: Node, sizes: list[Any], kernel: list[int], strides: list[int], dilations: list[int], auto_pad: str,
    pads: list[int] | None,
) -> list[tuple[int, int]]:  # fmt: skip
    """Return the elements that are added before and after each dimension."""
    dims = len(kernel)
    if auto_pad in ("NOTSET", ""):
        both = pads or [0] * 2 * dims
        if len(both) != 2 * dims:
            raise CaptureError(f"{node}: {len(both)} pads do not fit {dims} dimensions")
        return list(zip(both[:dims], both[dims:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * dims
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise CaptureError(f"{node}: there is no auto_pad {auto_pad!r}")
    found = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        small = total // 2
        found.append((small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small))
    return found


def padded(x: Tensor, around: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Add elements around the last dimensions."""
    flat = [one for pair in reversed(around) for one in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def convolved(
    node: Node, x: Tensor, weight: Tensor, bias: Tensor | None, *, auto_pad: str = "NOTSET",
    dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
    pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Convolve `x [N, C, *sizes]` with `weight [O, C / group, *kernel]`."""
    dims = x.dim() - 2
    kernel = list(weight.shape[2:])
    if dims not in _CONV or len(kernel) != dims or (kernel_shape or kernel) != kernel:
        raise CaptureError(f"{node}: a kernel of {kernel} does not fit an input of {x.dim()} dimensions")
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    pairs = around(node, list(x.shape[2:]), kernel, strides, dilations, auto_pad, pads)
    even = all(a == b and a >= 0 for a, b in pairs)
    x = x if even else padded(x, pairs)
    return _CONV[dims](x, weight, bias, strides, [a if even else 0 for a, _ in pairs], dilations, group)


@rule("Conv")
def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return convolved(node, x, weight, bias, **options)


@rule("ConvTranspose")
def _conv_transpose(
    node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, auto_pad: str = "NOTSET",
    dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None, output_shape: list[int] | None = None,
    pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Convolve without padding, then take away what padding leaves out."""
    dims = x.dim() - 2
    if dims not in _TRANSPOSED:
        raise CaptureError(f"{node}: transposed convolutions of {dims} dimensions are not compiled")
    strides, dilations, extra = strides or [1] * dims, dilations or [1] * dims, output_padding or [0] * dims
    whole = [
        s * (size - 1) + (k - 1) * d + 1
        for size, k, s, d in zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=True)
    ]
    if output_shape is not None or auto_pad.startswith("SAME"):
        wanted = output_shape or [size * s for size, s in zip(x.shape[2:], strides, strict=True)]
        cuts = []
        for full, out, more in zip(whole, wanted[-dims:], extra, strict=True):
            total = full + more - out
            half = total // 2
            cuts.append((half, total - half) if auto_pad == "SAME_UPPER" else (total - half, half))
    else:
        cuts = around(node, list(x.shape[2:]), list(weight.shape[2:]), strides, dilations, auto_pad, pads)
    pairs = [(-a, more - b) for (a, b), more in zip(cuts, extra, strict=True)]
    late = bias if any(b > 0 for _, b in pairs) else None  # what is added has the bias too
    now = bias if late is None else None
    found = padded(_TRANSPOSED[dims](x, weight, now, strides, 0, 0, group, dilations), pairs)
    return found if late is None else found + late.reshape(-1, *[1] * dims)


@rule("Col2Im", plain=(1, 2))
def _col2im(
    node: Node, x: Tensor, image: list[int], block: list[int], *, dilations: list[int] | None = None,
    pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Add up columns where they come from in an image: a transposed convolution by ones at single places."""
    dims = len(image)
    strides, dilations, pads = strides or [1] * dims, dilations or [1] * dims, pads or [0] * 2 * dims
    area = math.prod(block)
    channels = x.shape[1] // area
    steps = [
        (size + pads[d] + pads[d + dims] - dilations[d] * (block[d] - 1) - 1) // strides[d] + 1
        for d, size in enumerate(image)
    ]
    spans = [size + pads[d] + pads[d + dims] for d, size in enumerate(image)]
    grid = torch.zeros([*block, *steps], dtype=torch.int64)
    for d in range(dims):
        inside = torch.arange(block[d]).reshape([-1 if e == d else 1 for e in range(2 * dims)]) * dilations[d]
        along = (
            torch.arange(steps[d]).reshape([-1 if e == dims + d else 1 for e in range(2 * dims)]) * strides[d]
        )
        grid = grid * spans[d] + inside + along
    places = grid.reshape(-1).expand(x.shape[0], channels, -1)
    flat = torch.zeros(x.shape[0], channels, math.prod(spans), dtype=x.dtype)
    summed = torch.scatter_add(flat, 2, places, x.reshape(x.shape[0], channels, -1))
    whole = summed.reshape(x.shape[0], channels, *spans)
    return padded(whole, [(-pads[d], -pads[d + dims]) for d in range(dims)])

"""Pools: the largest element, a mean or a norm of each window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

from .convolution import around, padded

__all__: list[str] = []

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _geometry(
    node: Node, x: Tensor, kernel: list[int], strides: list[int] | None, dilations: list[int] | None, auto_pad: str,
    pads: list[int] | None, ceil_mode: int,
) -> tuple[list[int], list[int], list[tuple[int, int]], list[int]]:  # fmt: skip
    """Return strides, dilations, what is added around, and what more the last windows reach over with `ceil_mode`."""
    dims = len(kernel)
    if x.dim() != dims + 2:
        raise CaptureError(f"{node}: a kernel of {kernel} does not fit an input of {x.dim()} dimensions")
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    pairs = around(node, list(x.shape[2:]), kernel, strides, dilations, auto_pad, pads)
    beyond = [0] * dims
    if ceil_mode:
        for d, (before, after) in enumerate(pairs):
            room = x.shape[2 + d] + before + after - dilations[d] * (kernel[d] - 1) - 1
            windows = -(-room // strides[d]) + 1
            if (windows - 1) * strides[d] >= x.shape[2 + d] + before:  # it would begin after the end
                windows -= 1
            beyond[d] = max(0, (windows - 1) * strides[d] - room)
    return strides, dilations, pairs, beyond


@rule("MaxPool")
def _max_pool(
    node: Node, x: Tensor, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    dilations: list[int] | None = None, pads: list[int] | None = None, storage_order: int = 0,
    strides: list[int] | None = None,
) -> Any:  # fmt: skip
    strides, dilations, pairs, beyond = _geometry(
        node, x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode
    )
    pairs = [(a, b + more) for (a, b), more in zip(pairs, beyond, strict=True)]
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    if len(node.outputs) < 2 or not node.outputs[1]:
        simple = all(a == b and 2 * a <= k for (a, b), k in zip(pairs, kernel_shape, strict=True))
        if simple and x.is_floating_point() and len(kernel_shape) in _MAX:
            return _MAX[len(kernel_shape)](x, kernel_shape, strides, [a for a, _ in pairs], dilations)
        return _windows(padded(x, pairs, least), kernel_shape, strides, dilations).amax(-1)
    values = _windows(padded(x, pairs, least), kernel_shape, strides, dilations)
    first = _order(x, storage_order)
    places = _windows(padded(first, pairs), kernel_shape, strides, dilations)
    at = values.argmax(-1, keepdim=True)
    return values.amax(-1), torch.gather(places, -1, at).squeeze(-1)


def _order(x: Tensor, by_columns: int) -> Tensor:
    """The place of each element in the whole tensor."""
    shape = list(x.shape)
    if not by_columns:
        return torch.arange(math.prod(shape)).reshape(shape)
    turned = [*shape[:2], *shape[:1:-1]]
    return torch.arange(math.prod(shape)).reshape(turned).permute(0, 1, *range(len(shape) - 1, 1, -1))


def _windows(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Tensor:
    """Return `[N, C, *windows, elements of a window]`."""
    dims = len(kernel)
    for d in range(dims):
        x = x.unfold(2 + d, dilations[d] * (kernel[d] - 1) + 1, strides[d])
    for d in range(dims):
        place: Any = (..., slice(None, None, dilations[d]), *[slice(None)] * (dims - 1 - d))
        x = x[place]
    return x.flatten(-dims)


@rule("AveragePool")
def _average_pool(
    node: Node, x: Tensor, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    count_include_pad: int = 0, dilations: list[int] | None = None, pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """The mean of a window; padding counts if it is asked for, what `ceil_mode` reaches over never does."""
    strides, dilations, pairs, beyond = _geometry(
        node, x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode
    )
    bare = not any(beyond) and (bool(count_include_pad) or not any(a or b for a, b in pairs))
    even = all(a == b and 2 * a <= k for (a, b), k in zip(pairs, kernel_shape, strict=True))
    if bare and even and set(dilations) == {1} and len(kernel_shape) < 4:
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel_shape)]
        return pool(x, kernel_shape, strides, [a for a, _ in pairs])
    counted = torch.ones(x.shape[2:], dtype=x.dtype)[None, None]
    counted = padded(padded(counted, pairs, float(count_include_pad)), [(0, more) for more in beyond])
    total = padded(x, [(a, b + more) for (a, b), more in zip(pairs, beyond, strict=True)])
    sums, counts = (_windows(v, kernel_shape, strides, dilations).sum(-1) for v in (total, counted))
    return sums / counts


@rule("LpPool")
def _lp_pool(
    node: Node, x: Tensor, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    dilations: list[int] | None = None, p: int = 2, pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    strides, dilations, pairs, beyond = _geometry(
        node, x, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode
    )
    whole = padded(x.abs().pow(p), [(a, b + more) for (a, b), more in zip(pairs, beyond, strict=True)])
    return _windows(whole, kernel_shape, strides, dilations).sum(-1).pow(1 / p)


@rule("GlobalAveragePool")
def _global_average(node: Node, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@rule("GlobalMaxPool")
def _global_max(node: Node, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


@rule("GlobalLpPool")
def _global_lp(node: Node, x: Tensor, *, p: int = 2) -> Tensor:
    return x.abs().pow(p).sum(list(range(2, x.dim())), keepdim=True).pow(1 / p)

"""Elements put at places that are given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.operators.convolution import padded
from specqd.frontends.onnx.rules import rule

from .indexing import from_the_end

__all__: list[str] = []

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@rule("ScatterElements")
def _scatter_elements(
    node: Node, x: Tensor, index: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    at = from_the_end(index, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, at, updates)
    return torch.scatter_reduce(x, axis, at, updates, _reduction(node, reduction))


@rule("ScatterND")
def _scatter_nd(node: Node, x: Tensor, index: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Put slices at places, along the first dimensions seen as one."""
    depth = index.shape[-1]
    front = x.shape[:depth]
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64)
    for k, size in enumerate(front):
        flat = flat * size + from_the_end(index[..., k], size)
    rows = x.reshape(-1, *x.shape[depth:])
    given = updates.reshape(-1, *x.shape[depth:])
    flat = flat.reshape(-1, *[1] * (rows.dim() - 1)).expand(given.shape)
    if reduction == "none":
        found = torch.scatter(rows, 0, flat, given)
    else:
        found = torch.scatter_reduce(rows, 0, flat, given, _reduction(node, reduction))
    return found.reshape(x.shape)


def _reduction(node: Node, reduction: str) -> str:
    if reduction not in _REDUCTIONS:
        raise CaptureError(f"{node}: there is no reduction {reduction!r}")
    return _REDUCTIONS[reduction]


@rule("TensorScatter")
def _tensor_scatter(
    node: Node, cache: Tensor, update: Tensor, begins: Tensor | None = None, *, axis: int = -2,
    mode: str = "linear",
) -> Tensor:  # fmt: skip
    """Write `update` into a cache along an axis, each sequence of the batch from a place of its own."""
    axis %= cache.dim()
    count, size = update.shape[axis], cache.shape[axis]
    first = torch.zeros(cache.shape[0], dtype=torch.int64) if begins is None else begins.long()
    at = first[:, None] + torch.arange(count)
    at = torch.remainder(at, size) if mode == "circular" else at
    shape = [cache.shape[0] if d == 0 else count if d == axis else 1 for d in range(cache.dim())]
    return torch.scatter(cache, axis, at.reshape(shape).expand(update.shape), update)


@rule("MaxUnpool", plain=(2,))
def _max_unpool(
    node: Node, x: Tensor, places: Tensor, shape: Any = None, *, kernel_shape: list[int],
    pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Put elements back where a maximum was found, which places count over the whole tensor."""
    dims = len(kernel_shape)
    pads, strides = pads or [0] * 2 * dims, strides or [1] * dims
    usual = [
        (size - 1) * s - pads[d] - pads[d + dims] + k
        for d, (size, s, k) in enumerate(zip(x.shape[2:], strides, kernel_shape, strict=True))
    ]
    inner = [*x.shape[:2], *usual]
    flat = torch.zeros(math.prod(inner), dtype=x.dtype)
    found = torch.scatter(flat, 0, places.reshape(-1), x.reshape(-1)).reshape(inner)
    return (
        found if shape is None else padded(found, [(0, a - b) for a, b in zip(shape[2:], usual, strict=True)])
    )

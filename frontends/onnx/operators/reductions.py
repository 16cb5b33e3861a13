"""Reductions, and the places of extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.values import single

__all__: list[str] = []

Reduced = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc").to(x.dtype)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _extreme(largest: bool) -> Reduced:
    def reduce(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if 0 not in (x.shape[a] for a in axes):
            return torch.amax(x, axes, keep) if largest else torch.amin(x, axes, keep)
        if x.dtype == torch.bool:
            return torch.any(x, dim=axes, keepdim=keep) if largest else torch.all(x, dim=axes, keepdim=keep)
        bounds = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        none = bounds.min if largest else bounds.max
        if x.is_floating_point():
            none = -torch.inf if largest else torch.inf
        return torch.full_like(_sum(x, axes, keep), none)

    return reduce


_REDUCTIONS: dict[str, Reduced] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _extreme(largest=True),
    "ReduceMin": _extreme(largest=False),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: _sum(x * x, axes, keep).sqrt().to(x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


@rule(*_REDUCTIONS, plain=(1,))
def _reduce(
    node: Node, x: Tensor, axes: list[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Reduce along axes, all of them if none are given; `axes` is an attribute in old opsets."""
    if not axes and noop_with_empty_axes:
        # What is done to each element before the sum is still done.
        along: list[int] = []
        squares = {"ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceSumSquare": torch.square,
                   "ReduceLogSum": torch.log}  # fmt: skip
        return squares.get(node.op, torch.clone)(x)
    along = axes or list(range(x.dim()))
    return _REDUCTIONS[node.op](x, along, bool(keepdims)) if along else _of_scalar(node, x)


def _of_scalar(node: Node, x: Tensor) -> Tensor:
    return _REDUCTIONS[node.op](x.reshape(1), [0], False)


@rule("ArgMax", "ArgMin")
def _argument(
    node: Node, x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
) -> Tensor:
    function = torch.argmax if node.op == "ArgMax" else torch.argmin
    if not select_last_index:
        return function(x, axis, bool(keepdims))
    return x.shape[axis] - 1 - function(x.flip(axis), axis, bool(keepdims))


@rule("Hardmax")
def _hardmax(node: Node, x: Tensor, *, axis: int = -1) -> Tensor:
    places = torch.arange(x.shape[axis]).reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
    return (places == torch.argmax(x, axis, True)).to(x.dtype)


@rule("TopK", plain=(1,))
def _topk(node: Node, x: Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """Equal elements keep their order, as ONNX asks for."""
    count = single(k)
    if isinstance(count, int) and isinstance(x.shape[axis], int) and count > x.shape[axis]:
        raise CaptureError(f"{node}: it asks for {count} of {x.shape[axis]} elements")
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@rule("CumSum", "CumProd", plain=(1,))
def _cumulative(node: Node, x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    along = single(axis)
    x = x.flip(along) if reverse else x
    if exclusive:
        first = torch.full_like(x.narrow(along, 0, 1), 0 if node.op == "CumSum" else 1)
        x = torch.cat([first, x.narrow(along, 0, x.shape[along] - 1)], along)
    function = torch.cumsum if node.op == "CumSum" else torch.cumprod
    found = function(x, along, dtype=x.dtype)
    return found.flip(along) if reverse else found

"""Shapes: what tells, changes or follows the shape of a tensor and computes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specqd.errors import CaptureError
from specqd.frontends.onnx.coded import CODES, Coded
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.tensors import dtype_of
from specqd.frontends.onnx.values import known, numbers, single, sizes

__all__: list[str] = []


def held(x: Any, change: Any) -> Any:
    """Apply a change of shape to a tensor, or to the codes of one."""
    return Coded(change(x.codes), x.type) if isinstance(x, Coded) else change(x)


@rule("Identity", coded=True)
def _identity(node: Node, x: Any) -> Any:
    return x


@rule("OptionalGetElement", coded=True)
def _element(node: Node, x: Any) -> Any:
    return x


@rule("OptionalHasElement", coded=True)
def _has_element(node: Node, x: Any = None) -> Any:
    """Optional inputs are refused, so a value that there is has an element."""
    return known(x is not None, torch.bool)


@rule("Shape", coded=True)
def _shape(node: Node, x: Any, *, start: int = 0, end: int | None = None) -> Any:
    return sizes(list(x.shape)[slice(start, end)])


@rule("Size", coded=True)
def _size(node: Node, x: Any) -> Any:
    return sizes(np.array(math.prod(x.shape), dtype=object))


@rule("Reshape", plain=(1,), coded=True)
def _reshape(node: Node, x: Any, shape: list[Any], *, allowzero: int = 0) -> Any:
    wanted = [
        x.shape[at] if isinstance(s, int) and s == 0 and not allowzero else s for at, s in enumerate(shape)
    ]
    return held(x, lambda t: t.reshape(wanted))


@rule("Flatten", coded=True)
def _flatten(node: Node, x: Any, *, axis: int = 1) -> Any:
    at = axis + len(x.shape) if axis < 0 else axis
    front = math.prod(x.shape[:at])
    return held(x, lambda t: t.reshape(front, math.prod(x.shape[at:])))


@rule("Transpose", coded=True)
def _transpose(node: Node, x: Any, *, perm: list[int] | None = None) -> Any:
    return held(x, lambda t: t.permute(perm if perm is not None else list(range(t.dim()))[::-1]))


@rule("Squeeze", plain=(1,), coded=True)
def _squeeze(node: Node, x: Any, axes: list[int] | None = None) -> Any:
    wrong = [a for a in axes or () if x.shape[a] != 1]
    if wrong:
        raise CaptureError(
            f"{node}: the axis {wrong[0]} has {x.shape[wrong[0]]} elements and cannot be squeezed"
        )
    return held(x, lambda t: t.squeeze() if axes is None else t.squeeze(tuple(axes)))


@rule("Unsqueeze", plain=(1,), coded=True)
def _unsqueeze(node: Node, x: Any, axes: Any) -> Any:
    axes = axes if isinstance(axes, list) else [axes]
    rank = len(x.shape) + len(axes)
    places = {a + rank if a < 0 else a for a in axes}
    if len(places) != len(axes) or not places <= set(range(rank)):
        raise CaptureError(f"{node}: the axes {axes} are not distinct places among {rank} dimensions")
    rest = iter(x.shape)
    shape = [1 if at in places else next(rest) for at in range(rank)]
    return held(x, lambda t: t.reshape(shape))


@rule("Expand", plain=(1,))
def _expand(node: Node, x: Tensor, shape: list[Any]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


@rule("Tile", plain=(1,))
def _tile(node: Node, x: Tensor, repeats: list[Any]) -> Tensor:
    return x.repeat(repeats)


@rule("DepthToSpace")
def _depth_to_space(node: Node, x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b, deep = blocksize, c // (blocksize * blocksize)
    if mode == "DCR":
        parts = x.reshape(n, b, b, deep, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, deep, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, deep, h * b, w * b)


@rule("SpaceToDepth")
def _space_to_depth(node: Node, x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    parts = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.permute(order).reshape(n, c * b * b, h // b, w // b)


@rule("ConstantOfShape", plain=(0,))
def _constant_of_shape(node: Node, shape: list[Any], *, value: Any = None) -> Any:
    if isinstance(value, Coded):
        return Coded(value.codes.reshape(()).expand(shape), value.type)
    if value is None:
        return torch.zeros(shape)
    return torch.full(shape, np.ravel(numbers(value))[0].item(), dtype=value.dtype)


@rule("EyeLike")
def _eye_like(node: Node, x: Tensor, *, dtype: int = 0, k: int = 0) -> Tensor:
    kind = dtype_of(dtype, node) if dtype else x.dtype
    rows, columns = (torch.arange(size) for size in x.shape)
    return (columns[None, :] - rows[:, None] == k).to(kind)


@rule("Range", maybe=(0, 1, 2))
def _range(node: Node, start: Any, limit: Any, delta: Any) -> Tensor:
    start, limit, delta = map(single, (start, limit, delta))
    if any(isinstance(one, Tensor) for one in (start, limit, delta)):
        raise CaptureError(
            f"{node}: how many numbers it gives depends on the data; give its inputs as constants"
        )
    kind = node.types[0]
    return torch.arange(start, limit, delta, dtype=CODES[kind] if kind in CODES else dtype_of(kind, node))


@rule("Constant")
def _constant(node: Node, **values: Any) -> Any:
    (kind, value), *more = values.items() or [("", None)]
    if more or kind not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise CaptureError(
            f"{node}: it is given as {', '.join(values) or 'nothing'}; only tensors are compiled"
        )
    if kind == "value":
        return value
    return known(value, torch.float32 if "float" in kind else torch.int64)

"""Elements at places that are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.operators.shapes import held
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.values import is_known, numbers, single

__all__: list[str] = []


def from_the_end(index: Tensor, size: Any) -> Tensor:
    """Count negative indices from the end."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


@rule("Gather", coded=True)
def _gather(node: Node, x: Any, index: Tensor, *, axis: int = 0) -> Any:
    axis %= len(x.shape)
    size = x.shape[axis]
    if is_known(index) and isinstance(size, int):
        places = np.array(numbers(index))
        if places.size and not -size <= places.min() <= places.max() < size:
            raise CaptureError(f"{node}: its indices reach beyond the {size} elements of axis {axis}")
        if index.dim() == 0:
            return held(x, lambda t: t.select(axis, int(places) % size))
    at = from_the_end(index, size)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return held(x, lambda t: t.index_select(axis, at.reshape(-1)).reshape(shape))


@rule("GatherElements")
def _gather_elements(node: Node, x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, from_the_end(index, x.shape[axis]))


@rule("GatherND")
def _gather_nd(node: Node, x: Tensor, index: Tensor, *, batch_dims: int = 0) -> Tensor:
    depth = index.shape[-1]
    lead = [
        torch.arange(x.shape[d]).reshape([-1 if e == d else 1 for e in range(index.dim() - 1)])
        for d in range(batch_dims)
    ]
    places = [from_the_end(index[..., k], x.shape[batch_dims + k]) for k in range(depth)]
    return x[(*lead, *places)]


@rule("OneHot", plain=(1,))
def _one_hot(node: Node, index: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(single(depth))
    at = axis + index.dim() + 1 if axis < 0 else axis
    places = torch.arange(count).reshape([-1 if d == at else 1 for d in range(index.dim() + 1)])
    whole = index.long().unsqueeze(at)
    hit = torch.where(whole < 0, whole + count, whole) == places
    return torch.where(hit, values[1], values[0])


@rule("Compress", maybe=(1,))
def _compress(node: Node, x: Tensor, condition: Any, *, axis: int | None = None) -> Tensor:
    if isinstance(condition, Tensor):
        raise CaptureError(f"{node}: how much it keeps depends on the data; give its condition as a constant")
    kept = torch.tensor([at for at, keep in enumerate(condition) if keep], dtype=torch.int64)
    return x.reshape(-1)[kept] if axis is None else x.index_select(axis, kept)


@rule("NonZero", "Unique", "NonMaxSuppression")
def _of_data(node: Node, *inputs: Any, **attributes: Any) -> Any:
    raise CaptureError(f"{node}: how much it gives depends on the data, which is not compiled")

"""Pooling: reductions over windows of the padded input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.functions import INTEGERS
from specqd.codegen.general.kernels import blocked
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.joining import padded
from specqd.codegen.general.operators.pointwise import dtype_of
from specqd.codegen.general.reduce import extreme, limit, meeting, places, total
from specqd.codegen.general.values import Value, const, converted, i64, position, product
from specqd.codegen.tir import tirx
from specqd.errors import CodegenError

__all__ = ["RULES"]

aten = torch.ops.aten


def _each(values: Sequence[int], rank: int) -> list[int]:
    return [*values] * rank if len(values) == 1 else [*values]


def _windows(
    lowering: Lowering, x: Value, out: Sequence[Any], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], fill: float,
) -> Value:  # fmt: skip
    """Return `[..., out, window]`: of each window its elements, `fill` where it reaches beyond the input.

    Where channels lie in blocks, it is `[batch, blocks, out, block, window]`.
    """
    rank = len(kernel)
    x = x.blocks or x
    trail = x.shape[4:] if rank == 2 and len(x.shape) == 5 else ()
    first = len(x.shape) - rank - len(trail)
    before, after = [0] * len(x.shape), [0] * len(x.shape)
    for d, at in enumerate(range(first, first + rank)):
        reach = (out[d] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1
        before[at] = after[at] = padding[d]
        if isinstance(reach, int) and isinstance(x.shape[at], int):
            after[at] = max(reach - padding[d] - x.shape[at], 0)
    source = lowering.ready(padded(lowering, x, before, after, fill) if any((*before, *after)) else x)
    lead = source.shape[:first]

    def element(index: Sequence[Any]) -> Any:
        offsets = position(index[-1], kernel)
        moved = zip(index[first : first + rank], stride, offsets, dilation, strict=True)
        where = [i * s + k * d for i, s, k, d in moved]
        return source.at([*index[:first], *where, *index[first + rank : -1]])

    return source.view((*lead, *out, *trail, product(kernel)), element, 1)


def _pooled(lowering: Lowering, x: Value, shape: Sequence[Any]) -> Value:
    """Drop the dimension of the windows."""
    if len(x.shape) == len(shape) + 1:
        return lowering.reshape(x, shape)
    return blocked(lowering.reshape(x, x.shape[:-1]), shape)


def _max_pool(
    lowering: Lowering, node: fx.Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> Any:  # fmt: skip
    rank = len(kernel)
    given = node.meta["val"]
    shape = tuple(lowering.sizes(size) for size in given[0].shape)
    _demand_static(shape[len(shape) - rank :], ceil_mode)
    stride, padding, dilation = (_each(v, rank) for v in (stride or kernel, padding, dilation))
    out, dtype, meet = shape[len(shape) - rank :], x.dtype, meeting(x.dtype)
    fill = int(limit(dtype, least=True).value) if dtype in INTEGERS else float("-inf")
    with_places = any(user.args[1] == 1 and user.users for user in node.users)
    if with_places:
        x = replace(x, blocks=None)
    windows = converted(_windows(lowering, x, out, kernel, stride, padding, dilation, fill), meet)
    last = len(windows.shape) - 1
    if not with_places:
        found = _pooled(lowering, extreme(lowering, windows, [last], largest=True), shape)
        return lowering.ready(converted(found, dtype)), None
    values, where = (lowering.reshape(v, shape) for v in places(lowering, windows, last, largest=True))
    sizes = x.shape[len(x.shape) - rank :]

    def at(index: Sequence[Any]) -> Any:
        offsets = position(where.at(index), kernel)
        result: Any = i64(0)
        for i, k, s, p, d, size in zip(
            index[len(index) - rank :], offsets, stride, padding, dilation, sizes, strict=True
        ):
            result = result * size + (i * s + k * d - p)
        return result

    return converted(values, dtype), where.view(shape, at, 4)


def _avg_pool(
    lowering: Lowering, node: fx.Node, x: Value, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:  # fmt: skip
    shape = tuple(lowering.sizes(size) for size in node.meta["val"].shape)
    rank, dtype = len(kernel), dtype_of(node.meta["val"].dtype)
    _demand_static(shape[len(shape) - rank :], ceil_mode)
    kernel, stride, padding = (_each(v, rank) for v in (kernel, stride or kernel, padding))
    meet = meeting(dtype)
    out, sizes = shape[len(shape) - rank :], x.shape[len(x.shape) - rank :]
    windows = _windows(lowering, converted(x, meet), out, kernel, stride, padding, [1] * rank, 0)
    sums = _pooled(lowering, total(lowering, windows, [len(windows.shape) - 1]), shape)

    def count(index: Sequence[Any]) -> Any:
        result: Any = i64(1)
        for i, k, s, p, size in zip(index[len(index) - rank :], kernel, stride, padding, sizes, strict=True):
            begin = i * s - p
            end = tirx.min(begin + k, size + (p if count_include_pad else 0))
            result = result * (end - (begin if count_include_pad else tirx.max(begin, i64(0))))
        return tirx.Cast(meet, result)

    def at(index: Sequence[Any]) -> Any:
        by = const(divisor_override, meet) if divisor_override else count(index)
        return sums.at(index) / by if meet.startswith("float") else tirx.truncdiv(sums.at(index), by)

    found = sums.view(shape, at, 4)
    if sums.blocks is not None:
        inside = sums.blocks

        def deep(index: Sequence[Any]) -> Any:
            by = const(divisor_override, meet) if divisor_override else count(index[:4])
            return inside.at(index) / by

        found = replace(found, blocks=inside.view(inside.shape, deep, 4))
    return converted(found, dtype)


def _demand_static(shape: Sequence[Any], ceil_mode: bool) -> None:
    if ceil_mode and any(not isinstance(size, int) for size in shape):
        raise CodegenError("it pools a dynamic size with ceil_mode; leave ceil_mode out")


RULES: dict[Any, Callable[..., Any]] = {
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool3d_with_indices.default: _max_pool,
    aten.avg_pool1d.default: _avg_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool3d.default: _avg_pool,
}

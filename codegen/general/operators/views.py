"""Operators that rename indices: they cost nothing where they are read through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import broadcast
from specqd.codegen.general.values import Value, i64
from specqd.codegen.tir import tirx
from specqd.errors import CodegenError

__all__ = ["RULES", "permuted", "shape_of"]

aten, prims = torch.ops.aten, torch.ops.prims


def shape_of(lowering: Lowering, node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's tensor, dynamic ones as TIR expressions."""
    return tuple(lowering.sizes(size) for size in node.meta["val"].shape)


def permuted(x: Value, order: Sequence[int]) -> Value:
    """Reorder dimensions: dimension `d` of the result is `order[d]` of `x`."""
    order = [d % len(x.shape) for d in order]
    if order == list(range(len(order))):
        return x
    inverse = [order.index(d) for d in range(len(order))]
    return x.view([x.shape[d] for d in order], lambda index: x.at([index[d] for d in inverse]))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _reshape(lowering: Lowering, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    shape = shape_of(lowering, node)
    if 0 in shape:
        return x.view(shape, lambda index: x.at([i64(0)] * len(x.shape)))
    before = [d for d, size in enumerate(x.shape) if not _is_one(size)]
    after = [d for d, size in enumerate(shape) if not _is_one(size)]
    raw = [size for size in node.args[0].meta["val"].shape if not _is_one(size)]
    new = [size for size in node.meta["val"].shape if not _is_one(size)]
    if (
        x.tensor is None
        and len(raw) == len(new)
        and all(str(a) == str(b) for a, b in zip(raw, new, strict=True))
    ):

        def at(index: Sequence[Any]) -> Any:
            source: list[Any] = [i64(0)] * len(x.shape)
            for d, e in zip(before, after, strict=True):
                source[d] = index[e]
            return x.at(source)

        return x.view(shape, at)
    return lowering.reshape(x, shape)


def _permute(lowering: Lowering, node: fx.Node, x: Value, order: Sequence[int]) -> Value:
    return permuted(x, order)


def _transpose(lowering: Lowering, node: fx.Node, x: Value, first: int, second: int) -> Value:
    order = list(range(len(x.shape)))
    if order:
        order[first], order[second] = order[second], order[first]
    return permuted(x, order)


def _matrix_transpose(lowering: Lowering, node: fx.Node, x: Value) -> Value:
    return permuted(x, list(reversed(range(len(x.shape)))))


def _expand(lowering: Lowering, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return broadcast(lowering, x, shape_of(lowering, node))


def _broadcast_in_dim(
    lowering: Lowering, node: fx.Node, x: Value, _: Any, dimensions: Sequence[int]
) -> Value:
    shape = shape_of(lowering, node)
    fixed = [_is_one(x.shape[d]) for d in range(len(x.shape))]
    return x.view(
        shape,
        lambda index: x.at([i64(0) if f else index[d] for d, f in zip(dimensions, fixed, strict=True)]),
    )


def _start(start: Any, size: Any) -> Any:
    if start is None:
        return 0
    if isinstance(start, int) and isinstance(size, int):
        return min(max(start + size if start < 0 else start, 0), size)
    if isinstance(start, int):
        return (
            start
            if start == 0
            else tirx.max(start + size, i64(0))
            if start < 0
            else tirx.min(i64(start), size)
        )
    moved = tirx.Select(start < i64(0), start + size, start)
    return tirx.min(tirx.max(moved, i64(0)), i64(size))


def _slice(
    lowering: Lowering,
    node: fx.Node,
    x: Value,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    dim %= len(x.shape)
    begin = _start(start, x.shape[dim])
    shape = shape_of(lowering, node)

    def at(index: Sequence[Any]) -> Any:
        return x.at([i * step + begin if d == dim else i for d, i in enumerate(index)])

    return x.view(shape, at)


def _select(lowering: Lowering, node: fx.Node, x: Value, dim: int, at: Any) -> Value:
    dim %= len(x.shape)
    if isinstance(at, int):
        at = at + x.shape[dim] if at < 0 else at
    else:
        at = tirx.Select(at < i64(0), at + x.shape[dim], at)
    where = i64(at)
    return x.view(shape_of(lowering, node), lambda index: x.at([*index[:dim], where, *index[dim:]]))


def _flip(lowering: Lowering, node: fx.Node, x: Value, dims: Sequence[int]) -> Value:
    turned = {d % len(x.shape) for d in dims} if x.shape else set()

    def at(index: Sequence[Any]) -> Any:
        return x.at([x.shape[d] - 1 - i if d in turned else i for d, i in enumerate(index)])

    return x.view(x.shape, at)


def _parts(lowering: Lowering, node: fx.Node, x: Value, _: Any, dim: int = 0) -> tuple[Value, ...]:
    dim %= len(x.shape)
    begin: Any = 0
    found = []
    for part in node.meta["val"]:
        shape = tuple(lowering.sizes(size) for size in part.shape)
        found.append(replace(_shifted(x, shape, dim, begin), blocks=_whole_blocks(x, shape, dim, begin)))
        begin = begin + shape[dim]
    return tuple(found)


def _whole_blocks(x: Value, shape: Sequence[Any], dim: int, begin: Any) -> Value | None:
    """See a part of the channels in blocks, if it is made of whole ones."""
    if x.blocks is None or dim != 1 or begin % x.blocks.shape[-1] or shape[1] % x.blocks.shape[-1]:
        return None
    size = x.blocks.shape[-1]
    deep = (x.blocks.shape[0], shape[1] // size, *x.blocks.shape[2:])
    return _shifted(x.blocks, deep, 1, begin // size)


def _shifted(x: Value, shape: Sequence[Any], dim: int, begin: Any) -> Value:
    return x.view(shape, lambda index: x.at([i + begin if d == dim else i for d, i in enumerate(index)]))


def _unbind(lowering: Lowering, node: fx.Node, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim %= len(x.shape)
    shape = [size for d, size in enumerate(x.shape) if d != dim]

    def part(at: int) -> Value:
        return x.view(shape, lambda index: x.at([*index[:dim], i64(at), *index[dim:]]))

    return tuple(part(at) for at in range(len(node.meta["val"])))


def _diagonal(
    lowering: Lowering, node: fx.Node, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Value:
    first, second = dim1 % len(x.shape), dim2 % len(x.shape)
    down, right = max(-offset, 0), max(offset, 0)
    rest = [d for d in range(len(x.shape)) if d not in (first, second)]

    def at(index: Sequence[Any]) -> Any:
        source: list[Any] = [i64(0)] * len(x.shape)
        for d, i in zip(rest, index[:-1], strict=True):
            source[d] = i
        source[first], source[second] = index[-1] + down, index[-1] + right
        return x.at(source)

    return x.view(shape_of(lowering, node), at)


def _unfold(lowering: Lowering, node: fx.Node, x: Value, dim: int, size: int, step: int) -> Value:
    dim = dim % len(x.shape) if x.shape else 0

    def at(index: Sequence[Any]) -> Any:
        *source, within = index
        if source:
            source[dim] = source[dim] * step + within
        return x.at(source)

    return x.view(shape_of(lowering, node), at)


def _as_strided(
    lowering: Lowering, node: fx.Node, x: Value, size: Any, stride: Sequence[Any], offset: Any = None
) -> Value:
    given = node.args[0].meta["val"]
    if not given.is_contiguous() or given.storage_offset() != 0:
        raise CodegenError("it depends on how its input lies in memory, and graphs only know values")
    line = lowering.reshape(x, (lowering.sizes(given.numel()),))
    begin = offset or 0

    def at(index: Sequence[Any]) -> Any:
        place: Any = begin
        for i, s in zip(index, stride, strict=True):
            place = place + i * s
        return line.at([i64(place)])

    return line.view(shape_of(lowering, node), at)


Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten._reshape_alias.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    prims.split_dim.default: _reshape,
    prims.collapse_view.default: _reshape,
    prims.squeeze.default: _reshape,
    prims.view_of.default: lambda lowering, node, x: x,
    aten.permute.default: _permute,
    prims.transpose.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _matrix_transpose,
    aten.expand.default: _expand,
    prims.broadcast_in_dim.default: _broadcast_in_dim,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.unbind.int: _unbind,
    aten.diagonal.default: _diagonal,
    aten.unfold.default: _unfold,
    aten.as_strided.default: _as_strided,
}

"""Operators that read at positions which other tensors tell; positions are checked, as eager torch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.elementwise import write
from specqd.codegen.general.kernel import Kernel
from specqd.codegen.general.kernels import blocked
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import broadcast
from specqd.codegen.general.operators.views import shape_of
from specqd.codegen.general.values import Value, i64
from specqd.codegen.tir import I, bind, tirx
from specqd.errors import CodegenError

__all__ = ["RULES", "checked", "picked"]

aten = torch.ops.aten


def checked(lowering: Lowering, value: Value, size: Any, *, from_the_end: bool = False) -> Value:
    """Return positions along a dimension as int64 from 0 on; the kernel stops with an error at one outside.

    With `from_the_end`, negative ones count from there.
    """
    value = lowering.settle(value)
    least = i64(0) - size if from_the_end else i64(0)

    def at(index: Sequence[Any]) -> Any:
        where = bind(tirx.Cast("int64", value.at(index)))
        with I.Assert(tirx.all(where >= least, where < i64(size)), "an index is out of range", "IndexError"):
            pass
        return tirx.Select(where < i64(0), where + size, where)

    positions = Value(value.shape, "int64", at, cost=2, simd=False)

    def emit(kernel: Kernel, out: Any) -> None:
        write(lowering, kernel, out, positions)

    return lowering.launch("positions", [(value.shape, "int64")], emit)[0]


def picked(
    lowering: Lowering, node: fx.Node, x: Value, indices: Sequence[Value | None]
) -> tuple[tuple[Any, ...], Callable[[Sequence[Any]], list[Any]]]:
    """Return the shape of what `x[indices]` is, and what turns an index of that into one of `x`."""
    if any(index is not None and index.dtype in ("bool", "uint8") for index in indices):
        raise CodegenError("how much a mask picks is only known once the data is")
    metas = [n.meta["val"] for n in node.args[1] if n is not None]
    common = tuple(lowering.sizes(s) for s in torch.broadcast_shapes(*(m.shape for m in metas)))
    where = {
        d: broadcast(lowering, checked(lowering, index, x.shape[d], from_the_end=True), common)
        for d, index in enumerate(indices)
        if index is not None
    }
    dims = list(where)
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    rest = [size for d, size in enumerate(x.shape) if d not in where]

    def place(index: Sequence[Any]) -> list[Any]:
        those = index[first : first + len(common)]
        others = iter([*index[:first], *index[first + len(common) :]])
        return [where[d].at(those) if d in where else next(others) for d in range(len(x.shape))]

    return (*rest[:first], *common, *rest[first:]), place


def _lookup(lowering: Lowering, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> Value:
    x = lowering.ready(x)
    shape, place = picked(lowering, node, x, indices)
    deep = x.blocks
    if deep is None or any(index is not None for index in indices[:2]) or len(shape) != len(x.shape):
        return x.view(shape, lambda index: x.at(place(index)), 2)

    def at(index: Sequence[Any]) -> Any:
        *_, row, column = place([index[0], i64(0), *index[2:4]])
        return deep.at([*index[:2], row, column, index[4]])

    return blocked(deep.view((*deep.shape[:2], *shape[2:], deep.shape[4]), at, 2), shape)


def _embedding(lowering: Lowering, node: fx.Node, table: Value, index: Value, *_: Any, **__: Any) -> Value:
    where = checked(lowering, index, table.shape[0])
    rank = len(index.shape)
    return table.view(shape_of(lowering, node), lambda i: table.at([where.at(i[:rank]), *i[rank:]]), 2)


def _index_select(lowering: Lowering, node: fx.Node, x: Value, dim: int, index: Value) -> Value:
    x = lowering.ready(x)
    if not x.shape:
        return x
    dim %= len(x.shape)
    where = checked(lowering, index, x.shape[dim])

    def at(i: Sequence[Any]) -> Any:
        there = where.at([i[dim]] if where.shape else [])
        return x.at([*i[:dim], there, *i[dim + 1 :]])

    return x.view(shape_of(lowering, node), at, 2)


def _gather(lowering: Lowering, node: fx.Node, x: Value, dim: int, index: Value, **_: Any) -> Value:
    x = lowering.ready(x)
    if not x.shape:
        return x.view(index.shape, lambda i: x.at([]))
    dim %= len(x.shape)
    where = checked(lowering, index, x.shape[dim])
    if not where.shape:
        return x.view((), lambda i: x.at([where.at([])]), 2)
    return x.view(index.shape, lambda i: x.at([*i[:dim], where.at(i), *i[dim + 1 :]]), 2)


RULES: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _lookup,
    aten._unsafe_index.Tensor: _lookup,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
}

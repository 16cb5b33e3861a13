"""Reductions: sums, extremes and their places, over any dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.kernels import blocked
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import dtype_of
from specqd.codegen.general.operators.views import shape_of
from specqd.codegen.general.reduce import (
    dimensions,
    extreme,
    mean,
    meeting,
    places,
    reduce,
    total,
    variance,
)
from specqd.codegen.general.values import Value, const, converted, i64, product
from specqd.codegen.tir import tirx

__all__ = ["RULES"]

aten = torch.ops.aten


# What an operator is told of `keepdim` is what its result's shape says.


def _finish(lowering: Lowering, node: fx.Node, x: Value) -> Value:
    """Drop the folded dimensions as the operator does, and give the result its dtype."""
    shape, dtype = shape_of(lowering, node), dtype_of(node.meta["val"].dtype)
    return converted(x if x.shape == shape else lowering.reshape(x, shape), dtype)


def _sum(lowering: Lowering, node: fx.Node, x: Value, dims: Any = None, *_: Any, **__: Any) -> Value:
    meet = meeting(dtype_of(node.meta["val"].dtype))
    return _finish(lowering, node, total(lowering, converted(x, meet), dimensions(dims, len(x.shape))))


def _mean(lowering: Lowering, node: fx.Node, x: Value, dims: Any = None, *_: Any, **__: Any) -> Value:
    meet = meeting(dtype_of(node.meta["val"].dtype))
    dims = dimensions(dims, len(x.shape))
    if x.blocks is not None and x.dtype == meet and sorted(dims) == [2, 3]:
        found = lowering.settle(mean(lowering, x.blocks, [2, 3]))
        kept = blocked(found, (*x.shape[:2], 1, 1))
        return kept if kept.shape == shape_of(lowering, node) else _finish(lowering, node, kept)
    return _finish(lowering, node, mean(lowering, converted(x, meet), dims))


def _prod(lowering: Lowering, node: fx.Node, x: Value, dims: Any = None, *_: Any, **__: Any) -> Value:
    meet = meeting(dtype_of(node.meta["val"].dtype))
    dims = dimensions(dims, len(x.shape))
    return _finish(
        lowering,
        node,
        reduce(lowering, converted(x, meet), dims, const(1, meet), lambda a, b: a * b, "product"),
    )


def _extreme(*, largest: bool) -> Callable[..., Value]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dims: Any = None, *_: Any, **__: Any) -> Value:
        dims = dimensions(dims, len(x.shape))
        x = converted(x, meeting(x.dtype))
        return _finish(lowering, node, extreme(lowering, x, dims, largest=largest))

    return rule


def _truth(*, every: bool) -> Callable[..., Value]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dims: Any = None, *_: Any, **__: Any) -> Value:
        dims = dimensions(dims, len(x.shape)) if dims != [] else []
        # As int32: vectors of bool have no arithmetic.
        numbers = converted(converted(x, "bool"), "int32")
        of = tirx.min if every else tirx.max
        found = reduce(lowering, numbers, dims, const(int(every), "int32"), of, "all" if every else "any")
        return _finish(lowering, node, found)

    return rule


def _with_places(*, largest: bool) -> Callable[..., Any]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Any:
        if not x.shape:
            return x, Value((), "int64", lambda _: i64(0))
        found = places(lowering, converted(x, meeting(x.dtype)), dim % len(x.shape), largest=largest)
        shape = tuple(lowering.sizes(size) for size in node.meta["val"][0].shape)
        values, where = (v if v.shape == shape else lowering.reshape(v, shape) for v in found)
        return converted(values, x.dtype), where

    return rule


def _argument(*, largest: bool) -> Callable[..., Value]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
        x = converted(x, meeting(x.dtype))
        if dim is None or not x.shape:
            x, dim = lowering.reshape(x, (product(x.shape),)), 0
        where = places(lowering, x, dim % len(x.shape), largest=largest)[1]
        return _finish(lowering, node, where)

    return rule


def _variance(
    lowering: Lowering, node: fx.Node, x: Value, dims: Any = None, *, correction: Any = 1, **_: Any
) -> Value:
    return _finish(lowering, node, variance(lowering, x, dims, correction)[0])


def _variance_and_mean(
    lowering: Lowering, node: fx.Node, x: Value, dims: Any = None, *, correction: Any = 1, **_: Any
) -> tuple[Value, ...]:
    shape = tuple(lowering.sizes(size) for size in node.meta["val"][0].shape)
    found = variance(lowering, x, dims, correction)
    return tuple(converted(v if v.shape == shape else lowering.reshape(v, shape), x.dtype) for v in found)


RULES: dict[Any, Callable[..., Any]] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.prod.default: _prod,
    aten.prod.dim_int: _prod,
    aten.amax.default: _extreme(largest=True),
    aten.amin.default: _extreme(largest=False),
    aten.max.default: _extreme(largest=True),
    aten.min.default: _extreme(largest=False),
    aten.max.dim: _with_places(largest=True),
    aten.min.dim: _with_places(largest=False),
    aten.argmax.default: _argument(largest=True),
    aten.argmin.default: _argument(largest=False),
    aten.any.default: _truth(every=False),
    aten.any.dim: _truth(every=False),
    aten.any.dims: _truth(every=False),
    aten.all.default: _truth(every=True),
    aten.all.dim: _truth(every=True),
    aten.all.dims: _truth(every=True),
    aten.var.correction: _variance,
    aten.var_mean.correction: _variance_and_mean,
}

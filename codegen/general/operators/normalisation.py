"""Softmax and norms: what is known of a row first, then its elements, as expressions that go on into what follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.functions import unary
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import dtype_of
from specqd.codegen.general.reduce import extreme, meeting, total, variance
from specqd.codegen.general.values import Value, const, converted, i64, one
from specqd.codegen.tir import tirx

__all__ = ["RULES"]

aten = torch.ops.aten


def _zeroed(index: Sequence[Any], dims: Sequence[int]) -> list[Any]:
    return [i64(0) if d in dims else i for d, i in enumerate(index)]


def _softmax(*, log: bool) -> Callable[..., Value]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dim: int, half_to_float: bool = False) -> Value:
        dtype = dtype_of(node.meta["val"].dtype)
        meet = meeting(dtype)
        if not x.shape:
            return Value((), dtype, lambda _: const(0 if log else 1, dtype))
        dims = [dim % len(x.shape)]
        x = lowering.ready(converted(x, meet))
        exp, simd = unary("exp", meet)
        most = lowering.settle(extreme(lowering, x, dims, largest=True))

        def shifted(index: Sequence[Any]) -> Any:
            return x.at(index) - most.at(_zeroed(index, dims))

        if log:
            powers = Value(
                x.shape, meet, lambda index: exp(shifted(index)), cost=x.cost + 8, simd=x.simd and simd
            )
            sums = total(lowering, powers, dims)
            logarithm = unary("log", meet)[0]
            logs = lowering.settle(
                Value(sums.shape, meet, lambda i: logarithm(sums.at(i)), cost=8, simd=simd)
            )
            found = x.view(x.shape, lambda index: shifted(index) - logs.at(_zeroed(index, dims)), 2)
            return converted(found, dtype)
        powers = lowering.settle(
            Value(x.shape, meet, lambda index: exp(shifted(index)), cost=x.cost + 8, simd=x.simd and simd)
        )
        sums = lowering.settle(total(lowering, powers, dims))
        return converted(powers.view(x.shape, lambda i: powers.at(i) / sums.at(_zeroed(i, dims)), 1), dtype)

    return rule


def _layer_norm(
    lowering: Lowering, node: fx.Node, x: Value, normalized: Sequence[int], weight: Value | None,
    bias: Value | None, eps: float,
) -> tuple[Value, Value, Value]:  # fmt: skip
    dtype = dtype_of(node.meta["val"][0].dtype)
    meet = meeting(dtype)
    x = lowering.ready(converted(x, meet))
    dims = list(range(len(x.shape) - len(normalized), len(x.shape)))
    spread, middle = variance(lowering, x, dims, 0)
    scale = lowering.settle(
        spread.view(spread.shape, lambda i: one(meet) / tirx.sqrt(spread.at(i) + const(eps, meet)), 3)
    )

    def at(index: Sequence[Any]) -> Any:
        row, inner = _zeroed(index, dims), index[dims[0] :]
        value = (x.at(index) - middle.at(row)) * scale.at(row)
        if weight is not None:
            value = value * converted(weight, meet).at(inner)
        return value if bias is None else value + converted(bias, meet).at(inner)

    return converted(x.view(x.shape, at, 4), dtype), middle, scale


def _group_norm(
    lowering: Lowering, node: fx.Node, x: Value, weight: Value | None, bias: Value | None, batch: Any,
    channels: Any, pixels: Any, groups: int, eps: float,
) -> tuple[Value, Value, Value]:  # fmt: skip
    dtype = dtype_of(node.meta["val"][0].dtype)
    meet = meeting(dtype)
    each = channels // groups
    rows = lowering.reshape(converted(x, meet), (batch, groups, each, pixels))
    spread, middle = variance(lowering, rows, [2, 3], 0)
    scale = lowering.settle(
        spread.view(spread.shape, lambda i: one(meet) / tirx.sqrt(spread.at(i) + const(eps, meet)), 3)
    )

    def at(index: Sequence[Any]) -> Any:
        row, channel = [*index[:2], i64(0), i64(0)], [index[1] * each + index[2]]
        value = (rows.at(index) - middle.at(row)) * scale.at(row)
        if weight is not None:
            value = value * converted(weight, meet).at(channel)
        return value if bias is None else value + converted(bias, meet).at(channel)

    found = lowering.reshape(rows.view(rows.shape, at, 4), x.shape)
    flat = (batch, groups)
    return converted(found, dtype), lowering.reshape(middle, flat), lowering.reshape(scale, flat)


RULES: dict[Any, Callable[..., Any]] = {
    aten._softmax.default: _softmax(log=False),
    aten._log_softmax.default: _softmax(log=True),
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}

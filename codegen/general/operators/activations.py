"""Activation functions: one line each, from a scalar expression to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from specqd.codegen.general import functions
from specqd.codegen.general.functions import unary
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import KIND, combine, elementwise
from specqd.codegen.general.reduce import meeting
from specqd.codegen.general.values import Value, const, one, zero
from specqd.codegen.tir import bind, tirx

__all__ = ["RULES"]

aten, prims = torch.ops.aten, torch.ops.prims

Function = Callable[..., Any]


def _gelu(k: str, x: Any, approximate: str = "none") -> Any:
    x = bind(x)
    if approximate == "tanh":
        inner = const(0.7978845608028654, k) * (x + const(0.044715, k) * x * x * x)
        return const(0.5, k) * x * (one(k) + unary("tanh", k)[0](inner))
    return const(0.5, k) * x * (one(k) + unary("erf", k)[0](x * const(0.7071067811865476, k)))


def _mish(k: str, x: Any) -> Any:
    # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), which is 1 in float32 long before e * e is too large.
    x = bind(x)
    e = bind(unary("exp", k)[0](tirx.min(const(20, k), x)))
    product = bind(e * (e + const(2, k)))
    return tirx.Select(x > const(20, k), x, x * product / (product + const(2, k)))


def _sigmoid(k: str, x: Any) -> Any:
    return one(k) / (one(k) + unary("exp", k)[0](zero(k) - x))


def _silu(k: str, x: Any) -> Any:
    x = bind(x)
    return x / (one(k) + unary("exp", k)[0](zero(k) - x))


def _softplus(lowering: Lowering, node: fx.Node, x: Value, beta: Any = 1, threshold: Any = 20) -> Value:
    meet = meeting(x.dtype)
    powers = combine(
        lowering, node, lambda k, x: unary("exp", k)[0](x * const(beta, k)), [x], {}, meet, _vector, 8
    )

    def function(k: str, x: Any, e: Any) -> Any:
        return tirx.Select(
            x * const(beta, k) > const(threshold, k), x, unary("log1p", k)[0](e) / const(beta, k)
        )

    return combine(lowering, node, function, [x, lowering.settle(powers)], {}, meet, _vector, 10)


def _vector(k: str) -> bool:
    return k == "float32"


def _elu(k: str, x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    alpha, scale, inner = (
        const(v, k) if isinstance(v, int | float) else v for v in (alpha, scale, input_scale)
    )
    x = bind(x)
    return tirx.Select(x > zero(k), x * scale, unary("expm1", k)[0](x * inner) * alpha * scale)


def _leaky(k: str, x: Any, slope: Any = 0.01) -> Any:
    x = bind(x)
    return tirx.Select(x > zero(k), x, x * (const(slope, k) if isinstance(slope, float | int) else slope))


def _sixth(k: str, x: Any) -> Any:
    return functions.clamp(x + const(3, k), zero(k), const(6, k)) / const(6, k)


def _hardtanh(k: str, x: Any, low: Any = -1, high: Any = 1) -> Any:
    low, high = (const(v, k) if isinstance(v, float | int) else v for v in (low, high))
    return functions.clamp(x, low, high)


RULES: dict[Any, Function] = {
    aten.relu.default: elementwise(lambda k, x: tirx.max(zero(k), x)),
    aten.gelu.default: elementwise(_gelu, simd=_vector, cost=20),
    aten.sigmoid.default: elementwise(_sigmoid, KIND.INT_TO_FLOAT, simd=_vector, cost=10),
    aten.mish.default: elementwise(_mish, simd=_vector, cost=20),
    aten.silu.default: elementwise(_silu, simd=_vector, cost=10),
    aten.softplus.default: _softplus,
    aten.elu.default: elementwise(_elu, simd=_vector, cost=12),
    aten.leaky_relu.default: elementwise(_leaky, cost=2),
    aten.hardtanh.default: elementwise(_hardtanh),
    aten.hardsigmoid.default: elementwise(_sixth, cost=3),
    aten.hardswish.default: elementwise(lambda k, x: x * _sixth(k, x), cost=4),
}

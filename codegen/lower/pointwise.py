"""Elementwise operators: one line each, from scalar expressions to a scalar expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from specqd.codegen import maths
from specqd.codegen.lower.values import Index, Value
from specqd.codegen.lower.views import broadcast
from specqd.codegen.tir import f32, tirx

__all__ = ["ELEMENTWISE", "SCALAR_ONLY", "combine"]

aten = torch.ops.aten


def _add(a: Any, b: Any, alpha: Any = 1) -> Any:
    return maths.add(a, b if alpha == 1 else b * alpha)


def _sub(a: Any, b: Any, alpha: Any = 1) -> Any:
    return maths.subtract(a, b if alpha == 1 else b * alpha)


def _power(x: Any, exponent: Any) -> Any:
    if isinstance(exponent, int | float):
        if exponent in (1, 2, 3):
            return {1: x, 2: x * x, 3: x * x * x}[int(exponent)]
        if exponent == 0.5:
            return tirx.sqrt(x)
        if exponent == -0.5:
            return f32(1.0) / tirx.sqrt(x)
    return tirx.power(x, exponent)


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else tirx.max(x, low)
    return x if high is None else tirx.min(x, high)


def _leaky(x: Any, slope: Any) -> Any:
    return tirx.Select(x > f32(0.0), x, x * slope)


def _gelu(x: Any, approximate: str = "none") -> Any:
    return maths.gelu_tanh(x) if approximate == "tanh" else maths.gelu(x)


#: aten operator -> function of scalar expressions (and python scalars, as in the operator's own arguments)
ELEMENTWISE: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.rsub.Scalar: lambda a, b: maths.subtract(b, a),
    aten.mul.Tensor: lambda a, b: a * b,
    aten.div.Tensor: lambda a, b: a / b,
    aten.neg.default: lambda x: -x,
    aten.abs.default: tirx.abs,
    aten.reciprocal.default: lambda x: f32(1.0) / x,
    aten.sqrt.default: tirx.sqrt,
    aten.rsqrt.default: lambda x: f32(1.0) / tirx.sqrt(x),
    aten.pow.Tensor_Scalar: _power,
    aten.exp.default: maths.exp,
    aten.expm1.default: maths.expm1,
    aten.log.default: maths.log,
    aten.log1p.default: maths.log1p,
    aten.softplus.default: maths.softplus,
    aten.square.default: lambda x: x * x,
    aten.floor.default: tirx.floor,
    aten.tanh.default: maths.tanh,
    aten.sigmoid.default: maths.sigmoid,
    aten.silu.default: maths.silu,
    aten.gelu.default: _gelu,
    aten.erf.default: maths.erf,
    aten.relu.default: lambda x: tirx.max(x, f32(0.0)),
    aten.leaky_relu.default: lambda x, slope=0.01: _leaky(x, slope),
    aten.prelu.default: _leaky,
    aten.hardtanh.default: lambda x, low=-1.0, high=1.0: _clamp(x, low, high),
    aten.hardswish.default: lambda x: x * _clamp(x + f32(3.0), f32(0.0), f32(6.0)) / f32(6.0),
    aten.mish.default: maths.mish,
    aten.cos.default: tirx.cos,
    aten.sin.default: tirx.sin,
    aten.clamp.default: _clamp,
    aten.clip.default: _clamp,
    aten.clamp_min.default: lambda x, low: _clamp(x, low),
    aten.maximum.default: tirx.max,
    aten.minimum.default: tirx.min,
    aten.max.other: tirx.max,
    aten.min.other: tirx.min,
    aten.where.self: lambda c, a, b: tirx.Select(c, a, b),
    aten.gt.Scalar: lambda a, b: a > b,
    aten.lt.Scalar: lambda a, b: a < b,
    aten.ge.Scalar: lambda a, b: a >= b,
    aten.le.Scalar: lambda a, b: a <= b,
    aten.gt.Tensor: lambda a, b: a > b,
    aten.lt.Tensor: lambda a, b: a < b,
    aten.ge.Tensor: lambda a, b: a >= b,
    aten.le.Tensor: lambda a, b: a <= b,
    aten.clone.default: lambda x, memory_format=None: x,
    aten.contiguous.default: lambda x, memory_format=None: x,
}

#: operators that exist only one element at a time, as calls into libm
SCALAR_ONLY = {aten.cos.default, aten.sin.default}


def _kind(operands: Sequence[Any], dtype: str) -> str:
    """The dtype in which operands meet: a comparison's is that of what it compares, not of its result."""
    kinds = {
        x.dtype if isinstance(x, Value) else "float32" if isinstance(x, float) else dtype for x in operands
    }
    if dtype == "float32" or "float32" in kinds:
        return "float32"
    return "int32" if "int32" in kinds else dtype


def combine(
    function: Callable[..., Any],
    operands: Sequence[Any],
    options: dict[str, Any],
    shape: Sequence[int],
    dtype: str,
) -> Value:
    """Apply a scalar function to broadcast values (and python scalars) of one output shape and dtype."""
    spread = [broadcast(x, shape) if isinstance(x, Value) else x for x in operands]
    tensors = [x for x in spread if isinstance(x, Value)]
    kind = _kind(operands, dtype)

    def scalar(x: Any, index: Index) -> Any:
        if not isinstance(x, Value):
            return tirx.const(x, kind) if isinstance(x, int | float) and not isinstance(x, bool) else x
        expr = x.at(index)
        return tirx.Cast(kind, expr) if x.dtype not in (kind, "bool") else expr

    def at(index: Index) -> Any:
        if function is _power:
            return _power(scalar(spread[0], index), spread[1])
        return function(*(scalar(x, index) for x in spread), **options)

    breaks = frozenset().union(*(t.breaks for t in tensors)) if tensors else frozenset()
    return Value(tuple(shape), dtype, at, breaks=breaks, vectorises=all(t.vectorises for t in tensors))

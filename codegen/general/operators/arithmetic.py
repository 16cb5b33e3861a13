"""Elementwise arithmetic, comparisons and conversions, one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specqd.codegen.general import functions
from specqd.codegen.general.functions import FLOATS, fma, unary
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import KIND, broadcast, combine, dtype_of, elementwise
from specqd.codegen.general.values import Value, cast, const, converted, differ, divide, is_nan, one, zero
from specqd.codegen.tir import bind, tirx

__all__ = ["RULES"]

aten, prims = torch.ops.aten, torch.ops.prims

Function = Callable[..., Any]


def _float(name: str, cost: int = 8) -> Function:
    """Make the rule of a function that floats have, and integers are turned into floats for."""
    return elementwise(
        lambda k, x: unary(name, k)[0](x), KIND.INT_TO_FLOAT, simd=lambda k: unary(name, k)[1], cost=cost
    )


def _float_of_two(name: str) -> Function:
    return elementwise(lambda k, a, b: functions.libm(name, k, a, b), KIND.INT_TO_FLOAT, simd=False, cost=20)


def _integers_stay(name: str) -> Function:
    return elementwise(lambda k, x: unary(name, k)[0](x) if k in FLOATS else x)


def _compare(function: Function) -> Function:
    return elementwise(lambda k, a, b: function(a, b), KIND.ALWAYS_BOOL)


# Sums and products of floats are said as one operation of LLVM's: TVM would make `(x + y) - y` `x`, and `x * 0` 0.


def _add(k: str, a: Any, b: Any, alpha: Any = 1) -> Any:
    if k == "bool":
        return tirx.Or(a, b)
    if k in FLOATS:
        return fma(b, const(alpha, k), a, k)
    return a + (b if alpha == 1 else b * const(alpha, k))


def _sub(k: str, a: Any, b: Any, alpha: Any = 1) -> Any:
    if k in FLOATS:
        return fma(b, const(-alpha, k), a, k)
    return a - (b if alpha == 1 else b * const(alpha, k))


def _mul(k: str, a: Any, b: Any) -> Any:
    if k == "bool":
        return tirx.And(a, b)
    folded = any(isinstance(x, tirx.FloatImm) and x.value == 0 for x in (a, b))
    return fma(a, b, const(-0.0, k), k) if folded else a * b


def _div_mode(lowering: Lowering, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return _DIV(lowering, node, a, b)
    return (_FLOOR_DIVIDE if rounding_mode == "floor" else _TRUNC_DIVIDE)(lowering, node, a, b)


def _clamp(k: str, x: Any, min: Any = None, max: Any = None) -> Any:
    low, high = (const(v, k) if isinstance(v, float | int) else v for v in (min, max))
    return functions.clamp(x, low, high)


def _sign(k: str, x: Any) -> Any:
    if k == "bool":
        return x
    x = bind(x)
    sign = tirx.Select(x > zero(k), one(k), zero(k))
    return sign if k == "uint8" else sign - tirx.Select(x < zero(k), one(k), zero(k))


def _power(lowering: Lowering, node: fx.Node, x: Any, exponent: Any) -> Value:
    number = exponent if isinstance(exponent, int | float) and not isinstance(exponent, bool) else None
    whole = number is not None and number in (1, 2, 3, 0.5, -0.5, -1, -2)

    def function(k: str, a: Any, b: Any) -> Any:
        return functions.power(a, number if whole else b, k)[0]

    simd = (lambda k: k not in FLOATS) if not whole else True
    return elementwise(function, KIND.BOOL_TO_LONG, simd=simd, cost=2 if whole else 20)(
        lowering, node, x, exponent
    )


def _where(lowering: Lowering, node: fx.Node, condition: Value, a: Any, b: Any) -> Value:
    meet = dtype_of(node.meta["val"].dtype)
    shape = tuple(lowering.sizes(size) for size in node.meta["val"].shape)
    test = broadcast(lowering, condition, shape)

    def function(k: str, x: Any, y: Any, c: Any) -> Any:
        return c, x, y

    pair = combine(lowering, node, lambda k, x: x, [a], {}, meet, True, 0)
    other = combine(lowering, node, lambda k, x: x, [b], {}, meet, True, 0)

    def at(index: Sequence[Any]) -> Any:
        return tirx.Select(cast(test.at(index), test.dtype, "bool"), pair.at(index), other.at(index))

    parts = (test, pair, other)
    return Value(shape, meet, at, cost=1 + sum(p.cost for p in parts), simd=all(p.simd for p in parts))


def _convert(lowering: Lowering, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return converted(x, dtype_of(node.meta["val"].dtype))


def _same_value(lowering: Lowering, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return x


def _bits(function: Function, logical: Function) -> Function:
    return elementwise(lambda k, a, b: logical(a, b) if k == "bool" else function(a, b))


def _logical(function: Function) -> Function:
    return elementwise(lambda k, *xs: function(*(cast(x, k, "bool") for x in xs)), KIND.ALWAYS_BOOL)


def _differ(a: Any, b: Any) -> Any:
    return tirx.any(tirx.all(a, tirx.Not(b)), tirx.all(b, tirx.Not(a)))


def _of_integers(function: Function) -> Function:
    """Make the rule of a division, which is checked, element by element, where a tensor of integers divides."""
    return elementwise(function, simd=False, cost=8)


_DIV = elementwise(lambda k, a, b: divide(a, b), KIND.INT_TO_FLOAT, cost=2)
_FLOOR_DIVIDE = _of_integers(lambda k, a, b: functions.floor_divide(a, b, k))
_TRUNC_DIVIDE = _of_integers(lambda k, a, b: functions.truncated(a, b, k))
_REMAINDER = _of_integers(lambda k, a, b: functions.remainder(a, b, k))
_FMOD = _of_integers(lambda k, a, b: functions.truncated_remainder(a, b, k))

RULES: dict[Any, Function] = {
    aten.add.Tensor: elementwise(_add),
    aten.add.Scalar: elementwise(_add),
    aten.sub.Tensor: elementwise(_sub),
    aten.sub.Scalar: elementwise(_sub),
    aten.mul.Tensor: elementwise(_mul),
    aten.mul.Scalar: elementwise(_mul),
    aten.div.Tensor: _DIV,
    aten.div.Scalar: _DIV,
    aten.div.Tensor_mode: _div_mode,
    aten.div.Scalar_mode: _div_mode,
    aten.floor_divide.default: _FLOOR_DIVIDE,
    aten.remainder.Tensor: _REMAINDER,
    aten.remainder.Scalar: _REMAINDER,
    aten.fmod.Tensor: _FMOD,
    aten.fmod.Scalar: _FMOD,
    prims.fmod.default: _FMOD,
    aten.neg.default: elementwise(lambda k, x: zero(k) - x if k not in FLOATS else x * const(-1, k)),
    aten.abs.default: elementwise(lambda k, x: x if k in ("bool", "uint8") else tirx.abs(x)),
    aten.reciprocal.default: elementwise(lambda k, x: one(k) / x, KIND.INT_TO_FLOAT, cost=2),
    aten.rsqrt.default: elementwise(lambda k, x: one(k) / tirx.sqrt(x), KIND.INT_TO_FLOAT, cost=4),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.pow.Scalar: _power,
    **{
        getattr(aten, name).default: _float(name)
        for name in (
            "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "exp", "exp2", "expm1", "log",
            "log10", "log1p", "log2", "sin", "sinh", "tan", "tanh",
        )
    },
    aten.sqrt.default: _float("sqrt", 3),
    aten.floor.default: _integers_stay("floor"),
    aten.ceil.default: _integers_stay("ceil"),
    aten.trunc.default: _integers_stay("trunc"),
    aten.round.default: _integers_stay("nearbyint"),
    aten.atan2.default: _float_of_two("atan2"),
    aten.hypot.default: _float_of_two("hypot"),
    aten.copysign.Tensor: _float_of_two("copysign"),
    aten.sign.default: elementwise(_sign, cost=2),
    aten.isnan.default: elementwise(lambda k, x: is_nan(x, k), KIND.ALWAYS_BOOL),
    aten.isinf.default: elementwise(
        lambda k, x: tirx.EQ(tirx.abs(x), const(float("inf"), k)) if k in FLOATS else const(False, "bool"),
        KIND.ALWAYS_BOOL,
    ),
    aten.eq.Tensor: _compare(tirx.EQ),
    aten.ne.Tensor: elementwise(lambda k, a, b: differ(a, b, k), KIND.ALWAYS_BOOL),
    aten.lt.Tensor: _compare(lambda a, b: a < b),
    aten.le.Tensor: _compare(lambda a, b: a <= b),
    aten.gt.Tensor: _compare(lambda a, b: a > b),
    aten.ge.Tensor: _compare(lambda a, b: a >= b),
    aten.eq.Scalar: _compare(tirx.EQ),
    aten.ne.Scalar: elementwise(lambda k, a, b: differ(a, b, k), KIND.ALWAYS_BOOL),
    aten.lt.Scalar: _compare(lambda a, b: a < b),
    aten.le.Scalar: _compare(lambda a, b: a <= b),
    aten.gt.Scalar: _compare(lambda a, b: a > b),
    aten.ge.Scalar: _compare(lambda a, b: a >= b),
    aten.logical_and.default: _logical(tirx.And),
    aten.logical_or.default: _logical(tirx.Or),
    aten.logical_xor.default: _logical(_differ),
    aten.logical_not.default: _logical(tirx.Not),
    aten.bitwise_and.Tensor: _bits(tirx.bitwise_and, tirx.And),
    aten.bitwise_or.Tensor: _bits(tirx.bitwise_or, tirx.Or),
    aten.bitwise_xor.Tensor: _bits(tirx.bitwise_xor, _differ),
    aten.bitwise_and.Scalar: _bits(tirx.bitwise_and, tirx.And),
    aten.bitwise_or.Scalar: _bits(tirx.bitwise_or, tirx.Or),
    aten.bitwise_not.default: elementwise(lambda k, x: tirx.Not(x) if k == "bool" else tirx.bitwise_not(x)),
    aten.maximum.default: elementwise(lambda k, a, b: functions.maximum(a, b, k), cost=2),
    aten.minimum.default: elementwise(lambda k, a, b: functions.minimum(a, b, k), cost=2),
    aten.clamp.default: elementwise(_clamp),
    aten.where.self: _where,
    aten._to_copy.default: _convert,
    prims.convert_element_type.default: _convert,
    aten.clone.default: _same_value,
    aten.detach.default: _same_value,
    aten.alias.default: _same_value,
    aten.lift_fresh_copy.default: _same_value,
    aten.contiguous.default: _same_value,
}  # fmt: skip

# Torch's rules end in these, whose operands have one dtype and shape already.
_SAME = (
    "abs", "acos", "acosh", "add", "asin", "asinh", "atan", "atan2", "atanh", "bitwise_and", "bitwise_not",
    "bitwise_or", "bitwise_xor", "ceil", "cos", "cosh", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "hypot", "le", "log", "log10", "log1p", "log2", "lt", "maximum", "minimum", "mul", "ne", "neg", "pow",
    "reciprocal", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "sub", "tan", "tanh", "trunc", "where",
)  # fmt: skip
for _name in _SAME:
    _packet = getattr(aten, _name)
    _known = (getattr(_packet, overload) for overload in _packet.overloads())
    RULES[getattr(prims, _name).default] = next(RULES[overload] for overload in _known if overload in RULES)
RULES[prims.div.default] = _of_integers(
    lambda k, a, b: divide(a, b) if k in FLOATS else functions.truncated(a, b, k)
)

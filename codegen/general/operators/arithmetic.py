"""Elementwise arithmetic, comparisons and conversions, one line each."""

from __future__ import annotations

import math
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
from specqd.errors import CodegenError

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
    """Make the rule of `function(dtype, a, b)`; bools are compared as integers, for LLVM does not compare them."""

    def compare(k: str, a: Any, b: Any) -> Any:
        if k == "bool":
            k, a, b = "int32", cast(a, k, "int32"), cast(b, k, "int32")
        return function(k, a, b)

    return elementwise(compare, KIND.ALWAYS_BOOL)


# Sums and products of floats are said as one operation of LLVM's: TVM would make `(x + y) - y` `x`, and `x * 0` 0.


def _add(k: str, a: Any, b: Any, alpha: Any = 1) -> Any:
    if k == "bool":
        return tirx.bitwise_or(a, b)
    if k in FLOATS:
        return fma(b, const(alpha, k), a, k)
    return a + (b if alpha == 1 else b * const(alpha, k))


def _sub(k: str, a: Any, b: Any, alpha: Any = 1) -> Any:
    if k in FLOATS:
        return fma(b, const(-alpha, k), a, k)
    return a - (b if alpha == 1 else b * const(alpha, k))


def _mul(k: str, a: Any, b: Any) -> Any:
    if k == "bool":
        return tirx.bitwise_and(a, b)
    folded = any(isinstance(x, tirx.FloatImm) and x.value == 0 for x in (a, b))
    return fma(a, b, const(-0.0, k), k) if folded else a * b


def _div_mode(lowering: Lowering, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return _DIV(lowering, node, a, b)
    return (_FLOOR_DIVIDE if rounding_mode == "floor" else _TRUNC_DIVIDE)(lowering, node, a, b)


def _clamp(k: str, x: Any, min: Any = None, max: Any = None) -> Any:
    if any(isinstance(bound, tirx.FloatImm) and math.isnan(bound.value) for bound in (min, max)):
        return const(math.nan, k)
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
        return functions.power(a, number if whole else b, k)

    rule = elementwise(function, KIND.BOOL_TO_LONG, simd=whole, cost=2 if whole else 20)
    return rule(lowering, node, x, exponent)


def _where(lowering: Lowering, node: fx.Node, condition: Value, a: Any, b: Any) -> Value:
    meet = dtype_of(node.meta["val"].dtype)
    shape = tuple(lowering.sizes(size) for size in node.meta["val"].shape)
    test = broadcast(lowering, condition, shape)

    pair = combine(lowering, node, lambda k, x: x, [a], {}, meet, True, 0)
    other = combine(lowering, node, lambda k, x: x, [b], {}, meet, True, 0)

    def at(index: Sequence[Any]) -> Any:
        return tirx.Select(cast(test.at(index), test.dtype, "bool"), pair.at(index), other.at(index))

    parts = (test, pair, other)
    return Value(shape, meet, at, cost=1 + sum(p.cost for p in parts), simd=all(p.simd for p in parts))


def _convert(lowering: Lowering, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    to = node.meta["val"].dtype
    return converted(x, "bfloat16" if to is torch.bfloat16 else dtype_of(to))


def _bits_taken_for(lowering: Lowering, node: fx.Node, x: Value, *_: Any) -> Value:
    dtype = dtype_of(node.meta["val"].dtype)
    if node.args[0].meta["val"].dtype.itemsize != node.meta["val"].dtype.itemsize or "bool" in (
        x.dtype,
        dtype,
    ):
        raise CodegenError("only types of one width, and no bools, are taken for each other")
    return Value(
        x.shape, dtype, lambda index: tirx.reinterpret(dtype, x.at(index)), cost=x.cost + 1, simd=x.simd
    )


def _same_value(lowering: Lowering, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return x


# Of bools too, bit by bit: TVM would make `not a < b` `b <= a`, which is not so where one of them is NaN.


def _bits(function: Function) -> Function:
    return elementwise(lambda k, a, b: function(a, b))


def _bits_turned(k: str, x: Any) -> Any:
    return tirx.bitwise_xor(x, const(True, k)) if k == "bool" else tirx.bitwise_not(x)


def _logical(function: Function) -> Function:
    return elementwise(lambda k, *xs: function(*(cast(x, k, "bool") for x in xs)), KIND.ALWAYS_BOOL)


def _of_integers(function: Function) -> Function:
    """Make the rule of a division, which is checked, element by element, where a tensor of integers divides."""
    return elementwise(function, simd=False, cost=8)


_EQ = _compare(lambda k, a, b: tirx.Not(differ(a, b, k)))
_NE = _compare(lambda k, a, b: differ(a, b, k))
_LT, _LE = _compare(lambda k, a, b: a < b), _compare(lambda k, a, b: a <= b)
_GT, _GE = _compare(lambda k, a, b: a > b), _compare(lambda k, a, b: a >= b)
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
    aten.eq.Tensor: _EQ,
    aten.ne.Tensor: _NE,
    aten.lt.Tensor: _LT,
    aten.le.Tensor: _LE,
    aten.gt.Tensor: _GT,
    aten.ge.Tensor: _GE,
    aten.eq.Scalar: _EQ,
    aten.ne.Scalar: _NE,
    aten.lt.Scalar: _LT,
    aten.le.Scalar: _LE,
    aten.gt.Scalar: _GT,
    aten.ge.Scalar: _GE,
    aten.logical_and.default: _logical(tirx.bitwise_and),
    aten.logical_or.default: _logical(tirx.bitwise_or),
    aten.logical_xor.default: _logical(tirx.bitwise_xor),
    aten.logical_not.default: _logical(lambda x: _bits_turned("bool", x)),
    aten.bitwise_and.Tensor: _bits(tirx.bitwise_and),
    aten.bitwise_or.Tensor: _bits(tirx.bitwise_or),
    aten.bitwise_xor.Tensor: _bits(tirx.bitwise_xor),
    aten.bitwise_and.Scalar: _bits(tirx.bitwise_and),
    aten.bitwise_or.Scalar: _bits(tirx.bitwise_or),
    aten.bitwise_not.default: elementwise(_bits_turned),
    aten.maximum.default: elementwise(lambda k, a, b: functions.maximum(a, b, k), cost=2),
    aten.minimum.default: elementwise(lambda k, a, b: functions.minimum(a, b, k), cost=2),
    aten.clamp.default: elementwise(_clamp),
    aten.where.self: _where,
    aten._to_copy.default: _convert,
    prims.convert_element_type.default: _convert,
    aten.view.dtype: _bits_taken_for,
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

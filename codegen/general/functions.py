"""Scalar functions by dtype: those of codegen.maths in float32, where they vectorise, else those of libm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from specqd.codegen import maths
from specqd.codegen.general.values import const, differ, divide, is_nan, one, zero
from specqd.codegen.tir import I, bind, f32, intrinsic, local, tirx

__all__ = [
    "FLOATS",
    "INTEGERS",
    "VECTORS",
    "clamp",
    "floor_divide",
    "fma",
    "libm",
    "maximum",
    "minimum",
    "power",
    "remainder",
    "unary",
]

FLOATS = ("float32", "float64")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")


# (log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1]: Cephes, logf.c.
_LOG = (3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1, -1.2420140846e-1,
        1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2)  # fmt: skip


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    value: Any = f32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = maths.fma(value, x, f32(c))
    return value


# As in codegen.maths, but with every part bound: TVM takes long over expressions that repeat their parts.


def _exp(x: Any) -> Any:
    x = bind(x)
    scaled = bind(tirx.max(f32(-87.3), tirx.min(f32(89.0), x)))
    whole = bind(maths.fma(scaled, f32(1 / math.log(2)), f32(maths.ROUNDER)) - f32(maths.ROUNDER))
    part = bind(maths.fma(scaled, f32(1 / math.log(2)), whole * f32(-1.0)))
    powers = bind(_polynomial(part, [math.log(2) ** n / math.factorial(n) for n in range(8)]))
    exponent = tirx.shift_left(tirx.Cast("int32", whole) + tirx.const(127, "int32"), tirx.const(23, "int32"))
    # What is below the least float32 is 0 in torch, or nearly.
    return bind(tirx.Select(x < f32(-87.3), f32(0.0), powers * tirx.reinterpret("float32", exponent)))


def _expm1(x: Any) -> Any:
    x = bind(x)
    small = x * _polynomial(x, [1 / math.factorial(n) for n in range(1, 10)])
    return bind(tirx.Select(tirx.abs(x) < f32(0.5), small, _exp(x) - f32(1.0)))


def _log(x: Any) -> Any:
    x, least = bind(x), f32(2.0**-126)
    scaled = bind(tirx.Select(x < least, x * f32(2.0**23), x))
    bits = bind(tirx.reinterpret("int32", scaled))
    # 0x3F3504F3 is sqrt(1/2), which makes the mantissa lie in [sqrt(1/2), sqrt(2)).
    exponent = bind(tirx.shift_right(bits - tirx.const(0x3F3504F3, "int32"), tirx.const(23, "int32")))
    power = bind(tirx.Cast("float32", exponent) - tirx.Select(x < least, f32(23.0), f32(0.0)))
    mantissa = tirx.reinterpret("float32", bits - tirx.shift_left(exponent, tirx.const(23, "int32")))
    f = bind(mantissa - f32(1.0))
    tail = maths.fma(f * f * f, _polynomial(f, _LOG), power * f32(-2.12194440e-4))
    finite = maths.fma(power, f32(0.693359375), f + maths.fma(f * f32(-0.5), f, tail))
    finite = tirx.Select(x < f32(math.inf), finite, x)
    outside = tirx.Select(x < f32(0.0), f32(math.nan), f32(-math.inf))
    return bind(tirx.Select(x <= f32(0.0), outside, finite))


def _log1p(x: Any) -> Any:
    x = bind(x)
    whole = bind(maths.fma(x, f32(1.0), f32(1.0)))  # as an fma, for TVM would simplify `(x + 1) - 1` to `x`
    lost = bind(tirx.Select(whole > f32(0.0), (x - (whole - f32(1.0))) / whole, f32(0.0)))
    return bind(tirx.Select(x < f32(math.inf), _log(whole) + lost, x))


def _tanh(x: Any) -> Any:
    x = bind(x)
    square = bind(x * x)
    small = x * _polynomial(square, [1.0, -1 / 3, 2 / 15, -17 / 315])
    large = f32(1.0) - f32(2.0) / (_exp(x * f32(2.0)) + f32(1.0))
    return bind(tirx.Select(tirx.abs(x) < f32(0.1), small, large))


def _erf(x: Any) -> Any:
    # Near zero by its series, elsewhere by Abramowitz & Stegun 7.1.26, whose error is absolute.
    x = bind(x)
    size, square = bind(tirx.abs(x)), bind(x * x)
    series = _polynomial(square, [(-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(7)])
    t = bind(f32(1.0) / maths.fma(size, f32(0.3275911), f32(1.0)))
    terms = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    tail = bind(f32(1.0) - t * _polynomial(t, terms) * _exp(square * f32(-1.0)))
    large = tirx.Select(x < f32(0.0), f32(0.0) - tail, tail)
    return bind(tirx.Select(size < f32(0.6), x * series * f32(2 / math.sqrt(math.pi)), large))


#: functions that have a form for vectors of float32
VECTORS: dict[str, Callable[[Any], Any]] = {
    "exp": _exp,
    "expm1": _expm1,
    "log": _log,
    "log1p": _log1p,
    "tanh": _tanh,
    "erf": _erf,
    "sqrt": tirx.sqrt,
    "floor": tirx.floor,
    "ceil": tirx.ceil,
    "trunc": tirx.trunc,
}
_ALWAYS_VECTORS = ("sqrt", "floor", "ceil", "trunc")


def fma(a: Any, b: Any, c: Any, dtype: str) -> Any:
    """`a * b + c` of floats, in one operation or two, whatever the CPU has."""
    return intrinsic(dtype, "llvm.fmuladd", a, b, c)


def unary(name: str, dtype: str) -> tuple[Callable[[Any], Any], bool]:
    """Return a function of one float, and whether it vectorises."""
    if dtype == "float32" and name in VECTORS:
        return VECTORS[name], True
    if name == "nearbyint":  # TVM's own loses a bound variable that it reads, where it is simplified
        return (lambda x: intrinsic(dtype, "llvm.nearbyint", x)), True
    if name in _ALWAYS_VECTORS:
        return getattr(tirx, name), True
    return (lambda x: libm(name, dtype, x)), False


def libm(name: str, dtype: str, *args: Any) -> Any:
    """Call a function of C's library: TVM's own series of some of them are off in the third digit."""
    return tirx.call_pure_extern(dtype, f"{name}f" if dtype == "float32" else name, *args)


def maximum(a: Any, b: Any, dtype: str) -> Any:
    """The larger one; NaN if one is."""
    if dtype in FLOATS:
        # A maximum gives its second operand when one of them is NaN.
        a = bind(a)
        return tirx.Select(is_nan(a, dtype), a, tirx.max(a, b))
    return tirx.bitwise_or(a, b) if dtype == "bool" else tirx.max(a, b)


def minimum(a: Any, b: Any, dtype: str) -> Any:
    """The smaller one; NaN if one is."""
    if dtype in FLOATS:
        a = bind(a)
        return tirx.Select(is_nan(a, dtype), a, tirx.min(a, b))
    return tirx.bitwise_and(a, b) if dtype == "bool" else tirx.min(a, b)


def clamp(x: Any, low: Any, high: Any) -> Any:
    """Limit `x`, whose NaN stays: the limits come first, for a maximum gives its second operand then."""
    x = x if low is None else tirx.max(low, x)
    return x if high is None else tirx.min(high, x)


def floor_divide(a: Any, b: Any, dtype: str) -> Any:
    """Divide and round down, floats as Python does: `(a - a mod b) / b`, rounded."""
    if dtype in INTEGERS:
        return _whole(tirx.floordiv, a, b, dtype)
    a, b = bind(a), bind(b)
    rest = bind(libm("fmod", dtype, a, b))
    quotient = bind(divide(a - rest, b))
    quotient = bind(tirx.Select(_signs_differ(rest, b, dtype), quotient - one(dtype), quotient))
    floored = bind(tirx.floor(quotient))
    up = tirx.Select(quotient - floored > const(0.5, dtype), floored + one(dtype), floored)
    whole = tirx.Select(
        differ(quotient, zero(dtype), dtype), up, libm("copysign", dtype, zero(dtype), divide(a, b))
    )
    return tirx.Select(tirx.EQ(b, zero(dtype)), divide(a, b), whole)


def _whole(of: Callable[[Any, Any], Any], a: Any, b: Any, dtype: str) -> Any:
    """Divide integers: CPUs end the process for a division by zero, and for one whose result does not fit."""
    if isinstance(b, tirx.IntImm):
        return of(a, b)
    b = bind(b)
    with I.Assert(tirx.NE(b, zero(dtype)), "integers are divided by zero", "ValueError"):
        pass
    if dtype == "uint8":
        return of(a, b)
    minus = tirx.EQ(b, const(-1, dtype))
    found = of(a, tirx.Select(minus, one(dtype), b))
    turned = zero(dtype) if of in (tirx.floormod, tirx.truncmod) else zero(dtype) - a
    return tirx.Select(minus, turned, found)


def truncated(a: Any, b: Any, dtype: str) -> Any:
    """Divide and round towards zero."""
    return tirx.trunc(divide(a, b)) if dtype in FLOATS else _whole(tirx.truncdiv, a, b, dtype)


def truncated_remainder(a: Any, b: Any, dtype: str) -> Any:
    """The remainder with the sign of what is divided."""
    return libm("fmod", dtype, a, b) if dtype in FLOATS else _whole(tirx.truncmod, a, b, dtype)


def remainder(a: Any, b: Any, dtype: str) -> Any:
    """The remainder with the sign of the divisor."""
    if dtype in INTEGERS:
        return _whole(tirx.floormod, a, b, dtype)
    a, b = bind(a), bind(b)
    rest = bind(libm("fmod", dtype, a, b))
    return tirx.Select(_signs_differ(rest, b, dtype), rest + b, rest)


def _signs_differ(rest: Any, b: Any, dtype: str) -> Any:
    negative = zero(dtype)
    return tirx.all(
        tirx.NE(rest, negative),
        tirx.Or(tirx.all(rest < negative, b >= negative), tirx.all(rest >= negative, b < negative)),
    )


def power(x: Any, exponent: Any, dtype: str) -> Any:
    """`x` to a power, a number or an expression; exponents of 1, 2, 3, 0.5, -0.5, -1 and -2 vectorise."""
    simple: dict[float, Callable[[Any], Any]] = {
        1: lambda x: x,
        2: lambda x: x * x,
        3: lambda x: x * x * x,
    }
    if isinstance(exponent, int | float):
        if exponent in simple:
            return simple[exponent](bind(x))
        if dtype in FLOATS and exponent in (0.5, -0.5, -1, -2):
            root = tirx.sqrt(x) if abs(exponent) == 0.5 else x if exponent == -1 else _square(x)
            return one(dtype) / root if exponent < 0 else root
        exponent = const(exponent, dtype)
    return _integer_power(x, exponent, dtype) if dtype in INTEGERS else libm("pow", dtype, x, exponent)


def _square(x: Any) -> Any:
    x = bind(x)
    return x * x


def _integer_power(x: Any, exponent: Any, dtype: str) -> Any:
    """By repeated squaring, which wraps as torch does; below zero only 1 and -1 give anything."""
    x, exponent = bind(x), bind(exponent)
    result, base, left = (local(1, dtype) for _ in range(3))
    for at, start in ((result, one(dtype)), (base, x), (left, exponent)):
        I.buffer_store(at, start, [0])
    with I.serial(0, tirx.max_value(dtype).value.bit_length()):
        odd = tirx.EQ(tirx.bitwise_and(left[0], one(dtype)), one(dtype))
        I.buffer_store(result, result[0] * tirx.Select(odd, base[0], one(dtype)), [0])
        I.buffer_store(base, base[0] * base[0], [0])
        I.buffer_store(left, tirx.shift_right(left[0], one(dtype)), [0])
    if dtype == "uint8":
        return result[0]
    even = tirx.EQ(tirx.bitwise_and(exponent, one(dtype)), zero(dtype))
    turned = tirx.Select(even, one(dtype), const(-1, dtype))
    units = tirx.Select(
        tirx.EQ(x, one(dtype)), one(dtype), tirx.Select(tirx.EQ(x, const(-1, dtype)), turned, zero(dtype))
    )
    return tirx.Select(exponent < zero(dtype), units, result[0])

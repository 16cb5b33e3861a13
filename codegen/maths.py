"""Scalar functions as plain arithmetic, so that they vectorise; each gives the same bits in every lane.

Errors against float64, in units of the last place of float32, are checked by tests/test_maths.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from specqd.codegen.tir import bind, f32, i32, intrinsic, tirx

__all__ = [
    "add", "erf", "exp", "expm1", "fma", "gelu", "gelu_tanh", "log", "log1p", "mish", "sigmoid", "silu", "softplus",
    "subtract", "tanh",
]  # fmt: skip

#: adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to the nearest integer, ties to even
ROUNDER = 12582912.0
# Minimax-like polynomial of 2^f on [-0.5, 0.5] (Taylor of exp(f ln 2) to order 7; error below 1e-8).
_EXP2 = [math.log(2) ** n / math.factorial(n) for n in range(8)]
# Abramowitz & Stegun 7.1.26: |error| <= 1.5e-7.
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
# (log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1]: Cephes, logf.c.
_LOG = (3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1, -1.2420140846e-1,
        1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2)  # fmt: skip
# ln 2 in two parts, the first so short that its product with an exponent is exact.
_LN2 = (0.693359375, -2.12194440e-4)
# (e^x - 1) / x on [-0.5, 0.5]; Taylor, error below 1e-9.
_EXPM1 = [1 / math.factorial(n) for n in range(1, 10)]


def fma(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, with one rounding wherever the CPU has the instruction.

    Left to itself LLVM fuses a product into a sum when the product has no other reader, so the same formula could
    round differently in two functions. Saying it keeps a row's bits the same in all of them.
    """
    return intrinsic("float32", "llvm.fmuladd", a, b, c)


def add(a: Any, b: Any) -> Any:
    """`a + b`, as `fma` when one of them is a float32 product."""
    for product, other in ((a, b), (b, a)):
        if isinstance(product, tirx.Mul) and not _is_integer(product):
            return fma(product.a, product.b, other)
    return a + b


def subtract(a: Any, b: Any) -> Any:
    """`a - b`, as `fma` when one of them is a float32 product."""
    if isinstance(a, tirx.Mul) and not _is_integer(a):
        return fma(a.a, a.b, b * f32(-1.0))
    if isinstance(b, tirx.Mul) and not _is_integer(b):
        return fma(b.a * f32(-1.0), b.b, a)
    return a - b


def _is_integer(expr: Any) -> bool:
    return not str(expr.ty).startswith(("float", "T.float"))


def _polynomial(x: Any, coefficients: list[float]) -> Any:
    value = f32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = fma(value, x, f32(c))
    return value


def _once(value: Any, body: Callable[[Any], Any]) -> Any:
    """`body(value)` with the value computed once: expressions are trees, and would repeat it wherever it is read.

    It is bound by a statement, so an expression of these functions belongs where it is made.
    """
    return body(bind(value))


def exp(x: Any) -> Any:
    """`e^x` for float32; below -87.3 it is 0 within 1.3e-38, above 88.4 it is infinite."""
    # Constants come first: the minimum and maximum give their second operand when it is NaN.
    limited = tirx.max(f32(-87.3), tirx.min(f32(89.0), x))
    whole = fma(limited, f32(1.0 / math.log(2)), f32(ROUNDER)) - f32(ROUNDER)
    power = tirx.reinterpret("float32", tirx.shift_left(tirx.Cast("int32", whole) + i32(127), i32(23)))
    return _polynomial(fma(limited, f32(1.0 / math.log(2)), whole * f32(-1.0)), _EXP2) * power


def expm1(x: Any) -> Any:
    """`e^x - 1`; near zero by its series, where the difference would cancel."""
    return tirx.Select(tirx.abs(x) < f32(0.5), x * _polynomial(x, _EXPM1), add(exp(x), f32(-1.0)))


def log(x: Any) -> Any:
    """Natural logarithm: minus infinity at zero, NaN below."""
    return _once(x, _log)


def _log(x: Any) -> Any:
    least = f32(2.0**-126)
    scaled = tirx.Select(x < least, x * f32(2.0**23), x)
    bits = tirx.reinterpret("int32", scaled)
    # 0x3F3504F3 is sqrt(1/2), which makes the mantissa lie in [sqrt(1/2), sqrt(2)).
    exponent = tirx.shift_right(bits - i32(0x3F3504F3), i32(23))
    power = tirx.Cast("float32", exponent) - tirx.Select(x < least, f32(23.0), f32(0.0))
    mantissa = tirx.reinterpret("float32", bits - tirx.shift_left(exponent, i32(23)))

    def value(f: Any) -> Any:
        tail = fma(f * f * f, _polynomial(f, list(_LOG)), power * f32(_LN2[1]))
        return fma(power, f32(_LN2[0]), f + fma(f * f32(-0.5), f, tail))

    finite = tirx.Select(x < f32(math.inf), _once(mantissa - f32(1.0), value), x)
    outside = tirx.Select(x < f32(0.0), f32(math.nan), f32(-math.inf))
    return tirx.Select(x <= f32(0.0), outside, finite)


def log1p(x: Any) -> Any:
    """`log(1 + x)`, with what rounding `1 + x` lost put back."""
    # As an fma, because TVM would simplify `(x + 1) - 1` to `x`.
    return _once(x, lambda x: _once(fma(x, f32(1.0), f32(1.0)), lambda whole: _log1p(x, whole)))


def _log1p(x: Any, whole: Any) -> Any:
    lost = tirx.Select(whole > f32(0.0), (x - (whole - f32(1.0))) / whole, f32(0.0))
    return tirx.Select(x < f32(math.inf), _log(whole) + lost, x)


def softplus(x: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    """`log(1 + e^(beta x)) / beta`; `x` itself where `beta x` is above the threshold."""
    return _once(x * beta, lambda y: tirx.Select(y > threshold, x, log1p(exp(y)) / beta))


def mish(x: Any) -> Any:
    """`x * tanh(softplus(x))` (Misra, arXiv:1908.08681)."""
    # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), which is 1 in float32 long before e * e is too large.
    whole = exp(tirx.min(f32(20.0), x))
    factor = _once(whole, lambda e: e * (e + f32(2.0)) / fma(e, e + f32(2.0), f32(2.0)))
    return tirx.max(f32(-88.0), x) * factor  # below, the result is 0 within 2e-36


def sigmoid(x: Any) -> Any:
    """`1 / (1 + e^-x)`."""
    return f32(1.0) / (f32(1.0) + exp(f32(0.0) - x))


def silu(x: Any) -> Any:
    """`x * sigmoid(x)`."""
    return x / (f32(1.0) + exp(f32(0.0) - x))


def tanh(x: Any) -> Any:
    """`tanh(x)`; near zero by its odd series, where `1 - 2 / (e^2x + 1)` would cancel."""
    square = x * x
    small = x * _polynomial(square, [1.0, -1 / 3, 2 / 15, -17 / 315])
    large = f32(1.0) - f32(2.0) / (exp(x * f32(2.0)) + f32(1.0))
    return tirx.Select(tirx.abs(x) < f32(0.1), small, large)


def erf(x: Any) -> Any:
    """Error function, absolute error below 5e-7."""
    size = tirx.abs(x)
    t = f32(1.0) / fma(size, f32(0.3275911), f32(1.0))
    value = subtract(f32(1.0), t * _polynomial(t, list(_ERF)) * exp(size * (size * f32(-1.0))))
    return tirx.Select(x < f32(0.0), f32(0.0) - value, value)


def gelu(x: Any) -> Any:
    """`x / 2 * (1 + erf(x / sqrt 2))`."""
    return x * f32(0.5) * (f32(1.0) + erf(x * f32(math.sqrt(0.5))))


def gelu_tanh(x: Any) -> Any:
    """GELU by its tanh approximation (Hendrycks & Gimpel, section 2)."""
    inner = f32(math.sqrt(2 / math.pi)) * fma(f32(0.044715) * x * x, x, x)
    return f32(0.5) * x * (f32(1.0) + tanh(inner))

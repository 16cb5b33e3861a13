"""Operators from numbers to codes and back, where no kernel takes them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from specqd.codegen import maths
from specqd.codegen.general.codes import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import combine
from specqd.codegen.general.operators.views import shape_of
from specqd.codegen.general.values import Value
from specqd.codegen.tir import f32, tirx

__all__ = ["RULES"]


def _quantize(
    lowering: Lowering, node: fx.Node, x: Value, scale: float, zero: int, low: int, high: int, _: Any
) -> Value:
    """Round as kernels do, see dense_kernels.epilogue."""

    def function(_: str, value: Any) -> Any:
        limited = tirx.max(f32(low - zero), tirx.min(f32(high - zero), value * f32(1 / scale)))
        whole = maths.fma(limited, f32(1.0), f32(maths.ROUNDER)) - f32(maths.ROUNDER)
        return tirx.Cast("int32", whole) + tirx.const(zero, "int32")

    return combine(lowering, node, function, [x], {}, "float32", True, 4)


def _dequantize(
    lowering: Lowering, node: fx.Node, x: Value, scale: float, zero: int, *_: Any, **__: Any
) -> Value:
    # It costs no more than a load, so that what several read is not computed into a tensor of floats.
    return combine(
        lowering, node, lambda _, code: (code - f32(zero)) * f32(scale), [x], {}, "float32", True, 1
    )


def _dequantize_channels(
    lowering: Lowering, node: fx.Node, x: Value, scales: Value, zeros: Value | None, axis: int, *_: Any, **__: Any
) -> Value:  # fmt: skip
    def at(index: Sequence[Any]) -> Any:
        channel = [index[axis]]
        zero = f32(0.0) if zeros is None else tirx.Cast("float32", zeros.at(channel))
        return (tirx.Cast("float32", x.at(index)) - zero) * scales.at(channel)

    return Value(shape_of(lowering, node), "float32", at, cost=x.cost + 3, simd=x.simd)


RULES: dict[Any, Callable[..., Any]] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    DEQUANTIZE_CHANNELS: _dequantize_channels,
}

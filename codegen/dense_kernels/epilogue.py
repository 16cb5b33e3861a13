"""What is done to sums before they are stored: correction, scale, bias, residual, activation, rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specqd.codegen import maths
from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT
from specqd.codegen.dense_kernels.spec import RANGE, ConvSpec, GemmSpec
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.activations import bf16_bits
from specqd.codegen.tir import I, bind, f32, i32, tirx

__all__ = ["Ending"]


def _clip(x: Any, low: float, high: float) -> Any:
    # Constants come first: the minimum and maximum give their second operand when it is NaN.
    return tirx.max(f32(low), tirx.min(f32(high), x))


#: by the names of `spec.ACTIVATIONS`
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": lambda x: tirx.max(f32(0.0), x),
    "relu6": lambda x: _clip(x, 0.0, 6.0),
    "silu": maths.silu,
    "sigmoid": maths.sigmoid,
    "tanh": maths.tanh,
    "gelu": maths.gelu,
    "gelu_tanh": maths.gelu_tanh,
    "hardswish": lambda x: x * (_clip(x + f32(3.0), 0.0, 6.0) * f32(1 / 6)),
    "hardsigmoid": lambda x: _clip(x + f32(3.0), 0.0, 6.0) * f32(1 / 6),
    "mish": maths.mish,
}


class Ending:
    """The arguments that follow the weight, and the code that reads and writes them."""

    def __init__(
        self, kernel: Kernel, isa: ISA, spec: ConvSpec | GemmSpec, channels: int, shape: Any
    ) -> None:
        """Declare the arguments in order: correction, scale and steps of integers, bias, residual, output of `shape`.

        Those a channel have `channels`, a multiple of 16.
        """
        self.isa, self.spec = isa, spec
        self.integer = spec.dtype in RANGE
        view = "uint16" if spec.out_dtype == "bfloat16" else spec.out_dtype
        scaled = self.integer and spec.out_dtype != "int32"
        self.correction = kernel.argument("correction", (channels,), "int32") if self.integer else None
        self.scale = kernel.argument("scale", (channels,), "float32") if scaled else None
        rounds = spec.open_steps and spec.out_dtype in RANGE
        self.steps = kernel.argument("steps", (3,), "float32") if rounds else None
        self.bias = kernel.argument("bias", (channels,), "float32") if spec.epilogue.bias else None
        self.residual = (
            kernel.argument("residual", shape, spec.out_dtype, view) if spec.epilogue.residual else None
        )
        self.out = kernel.argument("out", shape, spec.out_dtype, view)

    def write(self, sums: Any, at: Any, channel: Any, to: Any, width: int = OUT) -> None:
        """End the sums of `width` channels from `channel`, and write them to the output from `to` on."""
        for first in range(0, width, self.isa.lanes):
            with I.vectorized(0, min(self.isa.lanes, width - first)) as lane:
                value = self._real(sums[at + first + lane], channel + first + lane)
                self._store(value, to + first + lane)

    def _real(self, value: Any, channel: Any) -> Any:
        if self.correction is not None:
            value = value + self.correction[channel]
        if self.scale is not None:
            value = tirx.Cast("float32", value) * self.scale[channel]
        return maths.add(value, self.bias[channel]) if self.bias is not None else value

    def _store(self, value: Any, to: Any) -> None:
        if self.residual is not None:
            value = maths.add(value, self._read(self.residual[to]))
        if self.spec.epilogue.activation is not None:
            value = _ACTIVATIONS[self.spec.epilogue.activation](bind(value))
        if self.spec.out_dtype == "bfloat16":
            value = tirx.Cast("uint16", bf16_bits(bind(value)))
        elif self.spec.out_dtype in RANGE:
            value = self._rounded(value)
        I.buffer_store(self.out, value, [to])

    def _read(self, stored: Any) -> Any:
        if self.spec.out_dtype == "bfloat16":
            return tirx.reinterpret("float32", tirx.shift_left(tirx.Cast("int32", stored), i32(16)))
        if self.spec.out_dtype in RANGE:
            how = self.spec.summand or self.spec.requantise
            steps = self.steps
            scale, zero = (f32(how.scale), f32(how.zero)) if steps is None else (steps[1], steps[2])
            return (tirx.Cast("float32", tirx.Cast("int32", stored)) - zero) * scale
        return stored

    def _rounded(self, value: Any) -> Any:
        low, high = RANGE[self.spec.out_dtype]
        zero = self.spec.requantise.zero
        inverse = f32(1 / self.spec.requantise.scale) if self.steps is None else self.steps[0]
        limited = _clip(value * inverse, low - zero, high - zero)
        # As an fma, because TVM would simplify `(x + r) - r` to `x`; NaN becomes `zero`.
        whole = maths.fma(limited, f32(1.0), f32(maths.ROUNDER)) - f32(maths.ROUNDER)
        return tirx.Cast(self.spec.out_dtype, tirx.Cast("int32", whole) + i32(zero))

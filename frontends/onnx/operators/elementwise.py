"""Arithmetic, comparisons and activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.values import single

__all__: list[str] = []

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "IsNaN": torch.isnan, "Log": torch.log,
    "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Relu": torch.relu,
    "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh, "BitwiseNot": torch.bitwise_not,
    "Softplus": lambda x: F.softplus(x, threshold=60.0), "Softsign": F.softsign, "Mish": F.mish,
    "HardSwish": F.hardswish,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt,
    "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, a, b: function(a, b)


for _operator, _function in _UNARY.items():
    rule(_operator)(_unary(_function))
for _operator, _function_of_two in _BINARY.items():
    rule(_operator)(_binary(_function_of_two))


@rule("Div")
def _div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@rule("Mod")
def _mod(node: Node, a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@rule("Pow")
def _pow(node: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


@rule("Max", "Min", "Sum", "Mean")
def _of_many(node: Node, *inputs: Tensor) -> Tensor:
    if not inputs:
        raise CaptureError(f"{node}: it has no inputs; the file is damaged")
    if node.op in ("Sum", "Mean"):
        total = functools.reduce(torch.add, inputs)
        return total / len(inputs) if node.op == "Mean" else total
    return functools.reduce(torch.maximum if node.op == "Max" else torch.minimum, inputs)


@rule("BitShift")
def _shift(node: Node, x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    """Multiply or divide by a power of two, rounding down; too far, and backward, only the sign is left."""
    bits = {TensorProto.UINT16: 16, TensorProto.UINT32: 32}.get(node.types[0], 8 * x.element_size())
    wide, by = x.long(), by.long()
    power = torch.pow(torch.full((), 2, dtype=torch.int64), by.clamp(0, 63))
    within = (by >= 0) & (by < bits)
    if direction == "LEFT":
        return torch.where(within, wide * power, 0).to(x.dtype)
    sign = torch.where(wide < 0, -1, 0)
    divided = torch.div(wide, power.clamp_min(1), rounding_mode="floor")
    return torch.where(within & (by < 63), divided, sign).to(x.dtype)


@rule("IsInf")
def _is_inf(node: Node, x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    wanted = torch.eq(x, -math.inf if detect_negative else math.inf)
    return wanted if detect_negative or detect_positive else torch.zeros_like(wanted)


@rule("Clip", maybe=(1, 2))
def _clip(node: Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))
    low, high = (single(v) for v in (low, high))
    if low is None and high is None:
        return x.clone()
    return torch.clamp(x, low, high)


@rule("PRelu")
def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@rule("LeakyRelu")
def _leaky_relu(node: Node, x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@rule("ThresholdedRelu")
def _thresholded_relu(node: Node, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0.0)


@rule("Elu")
def _elu(node: Node, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@rule("Celu")
def _celu(node: Node, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@rule("Selu")
def _selu(node: Node, x: Tensor, *, alpha: float = 1.67326319217681884765625,
          gamma: float = 1.05070102214813232421875) -> Tensor:  # fmt: skip
    return torch.where(x > 0, gamma * x, gamma * alpha * torch.expm1(x.clamp_max(0)))


@rule("HardSigmoid")
def _hard_sigmoid(node: Node, x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


@rule("Gelu")
def _gelu(node: Node, x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@rule("Swish")
def _swish(node: Node, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@rule("Shrink")
def _shrink(node: Node, x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


@rule("Where")
def _where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@rule("Dropout", maybe=(1, 2))
def _dropout(node: Node, x: Tensor, ratio: Any = None, training: Any = None, *, seed: int = 0) -> Any:
    """What is dropped at inference is nothing; training has to be known to be off."""
    active = isinstance(training, Tensor) or bool(single(training))
    if active and (isinstance(ratio, Tensor) or single(ratio) != 0):
        raise CaptureError(f"{node}: it may drop values at random, as in training; export for inference")
    return x.clone(), torch.ones_like(x, dtype=torch.bool)

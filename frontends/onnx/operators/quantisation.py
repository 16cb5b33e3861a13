"""Quantised tensors: to integers or small floats and back, and products of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

import specqd.ops  # noqa: F401  (registers quantized_decomposed::*)
from specqd.errors import CaptureError
from specqd.frontends.onnx.coded import INTEGERS, Coded, decode, encode, is_coded
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.tensors import dtype_of
from specqd.frontends.onnx.values import is_known, numbers

from .convolution import convolved

__all__: list[str] = []

quantized = torch.ops.quantized_decomposed

_BYTES = {TensorProto.UINT8: torch.uint8, TensorProto.INT8: torch.int8}

_RANGES = {
    **INTEGERS, TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127), TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
}  # fmt: skip


def _numbers(x: Any) -> Any:
    return decode(x) if isinstance(x, Coded) else x


def _spread(node: Node, values: Tensor, shape: torch.Size, axis: int, block: int) -> Tensor:
    """Give a scale or zero point, of the tensor, of a channel or of a block, the rank of the tensor."""
    if values.dim() == 0 or (values.dim() == 1 and values.shape[0] == 1 and not block):
        return values.reshape(())
    axis %= len(shape)
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    if values.dim() != 1:
        raise CaptureError(f"{node}: its scale has {values.dim()} dimensions and no block_size")
    return values.reshape([-1 if d == axis else 1 for d in range(len(shape))])


def quantised(x: Tensor, scale: Any, zero: Any, kind: int, *, saturate: bool = True) -> Any:
    """Divide by a scale, round to even, add the zero point, and keep within the type."""
    scaled = x / scale
    if kind not in _RANGES:
        return encode(scaled if zero is None else scaled + zero, kind, saturate=saturate)
    low, high = _RANGES[kind]
    whole = torch.round(scaled)
    shifted = whole if zero is None else whole + zero.to(whole.dtype)
    kept = torch.clamp(shifted, low, high)
    return encode(kept, kind) if is_coded(kind) else kept.to(torch.int32).to(dtype_of(kind, "the result"))


def _is_weight(node: Node, inputs: list[Any]) -> bool:
    """Whether it is an INT8 weight around 0, with a scale or one a channel, which kernels read."""
    x, scale, zero = (*inputs, None, None)[:3]
    simple = all(isinstance(v, Tensor) for v in (x, scale)) and not isinstance(zero, Coded)
    if not simple or x.dtype != torch.int8 or x.dim() < 2 or scale.dtype != torch.float32 or scale.dim() > 1:
        return False
    offset = zero is None or not np.any(numbers(zero))
    return offset and not node.attributes.get("block_size") and not node.attributes.get("output_dtype")


def _one(*values: Any) -> bool:
    """Whether values are known, and each is one for the whole tensor."""
    return all(v is None or (is_known(v) and not isinstance(v, Coded) and v.numel() == 1) for v in values)


def _number(value: Tensor) -> Any:
    return np.ravel(numbers(value))[0].item()


@rule("QuantizeLinear", coded=True, known=(1, 2))
def _quantize(
    node: Node, x: Any, scale: Any, zero: Any = None, *, axis: int = 1, block_size: int = 0,
    output_dtype: int = 0, precision: int = 0, saturate: int = 1,
) -> Any:  # fmt: skip
    """Divide by the scale; by one that is known, to bytes, as torch does: multiply by its inverse.

    That may round a number half way between two codes, to the last place, to the other one.
    """
    x = _numbers(x)
    kind = output_dtype or (node.types[2] if zero is not None else TensorProto.UINT8)
    if kind not in _RANGES and not is_coded(kind):
        raise CaptureError(f"{node}: it cannot quantise to {TensorProto.DataType.Name(kind)}")
    if kind in _BYTES and x.dtype == torch.float32 and _one(scale, zero) and not (block_size or is_known(x)):
        point = 0 if zero is None else int(_number(zero))
        return quantized.quantize_per_tensor(x, _number(scale), point, *_RANGES[kind], _BYTES[kind])
    wide = dtype_of(precision, node) if precision else torch.float32
    spread = _spread(node, _numbers(scale).to(wide), x.shape, axis, block_size)
    offset = None if zero is None else _spread(node, _numbers(zero), x.shape, axis, block_size)
    return quantised(x.to(wide), spread, offset, kind, saturate=bool(saturate))


@rule("DequantizeLinear", coded=True, known=(1, 2), keeps=_is_weight)
def _dequantize(
    node: Node,
    x: Any,
    scale: Any,
    zero: Any = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    target = output_dtype or (TensorProto.FLOAT if isinstance(scale, Coded) else node.types[1])
    kind = node.types[0]
    if target == TensorProto.FLOAT and not block_size and isinstance(scale, Tensor):
        if kind in _BYTES and not is_known(x) and _one(scale, zero):
            offset = 0 if zero is None else int(_number(zero))
            return quantized.dequantize_per_tensor(x, _number(scale), offset, *_RANGES[kind], _BYTES[kind])
        if _is_weight(node, [x, scale, zero]):
            axis = axis % x.dim() if scale.numel() > 1 else 0
            scales = scale.expand(x.shape[axis])
            return quantized.dequantize_per_channel(x, scales, None, axis, -128, 127, torch.int8)
    whole = _numbers(x).to(torch.float32 if isinstance(x, Coded) or x.dtype != torch.int32 else torch.int32)
    factor = _spread(node, _numbers(scale).float(), whole.shape, axis, block_size)
    if zero is not None:
        whole = whole - _spread(node, _numbers(zero).to(whole.dtype), whole.shape, axis, block_size)
    return (whole.float() * factor).to(dtype_of(target, node))


def _shifted(x: Tensor, zero: Tensor | None, rows: bool = False) -> Tensor:
    """Take a zero point off, in float64, in which sums of products of bytes are exact."""
    wide = x.double()
    if zero is None:
        return wide
    offset = zero.double()
    return wide - (offset[:, None] if rows and offset.dim() == 1 and offset.numel() > 1 else offset)


@rule("MatMulInteger")
def _matmul_integer(
    node: Node, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    product = torch.matmul(_shifted(a, a_zero, rows=True), _shifted(b, b_zero))
    return product.to(torch.int32)


@rule("ConvInteger")
def _conv_integer(
    node: Node, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    offset = w_zero if w_zero is None or w_zero.dim() == 0 else w_zero.reshape(-1, *[1] * (weight.dim() - 1))
    found = convolved(node, _shifted(x, x_zero), _shifted(weight, offset), None, **options)
    return found.to(torch.int32)


@rule("QLinearMatMul", coded=True)
def _qlinear_matmul(
    node: Node, a: Any, a_scale: Tensor, a_zero: Any, b: Any, b_scale: Tensor, b_zero: Any, y_scale: Tensor,
    y_zero: Any,
) -> Any:  # fmt: skip
    a, a_zero, b, b_zero, offset = (_numbers(v) for v in (a, a_zero, b, b_zero, y_zero))
    product = torch.matmul(_shifted(a, a_zero, rows=True), _shifted(b, b_zero))
    scale = a_scale.double() * b_scale.double() / y_scale.double()
    return quantised(product * scale, 1.0, offset, node.types[7])


@rule("QLinearConv")
def _qlinear_conv(
    node: Node, x: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, w_scale: Tensor, w_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor, bias: Tensor | None = None, **options: Any,
) -> Any:  # fmt: skip
    column = [-1, *[1] * (weight.dim() - 1)]
    offset = w_zero.reshape(column) if w_zero.dim() else w_zero
    whole = None if bias is None else bias.double()
    found = convolved(node, _shifted(x, x_zero), _shifted(weight, offset), whole, **options)
    scale = x_scale.double() * w_scale.double() / y_scale.double()
    shaped = scale.reshape(column[:-1]) if scale.dim() else scale
    return quantised(found * shaped, 1.0, y_zero, node.types[7])

"""Convolutions: windows of the padded input as the columns of a matrix product, for any number of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.factors import Factors
from specqd.codegen.general.kernels import convolution
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.joining import assemble, constant, padded
from specqd.codegen.general.operators.matrix import as_asked, multiply
from specqd.codegen.general.operators.pointwise import dtype_of
from specqd.codegen.general.operators.views import shape_of
from specqd.codegen.general.reduce import meeting
from specqd.codegen.general.values import Value, converted, position, product
from specqd.errors import CodegenError

__all__ = ["RULES"]

aten = torch.ops.aten


def _convolution(
    lowering: Lowering, node: fx.Node, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    dtype, shape = dtype_of(node.meta["val"].dtype), shape_of(lowering, node)
    meet = meeting(dtype)
    rank = len(weight.shape) - 2
    if len(x.shape) != rank + 2:
        raise CodegenError(f"it convolves a tensor of {len(x.shape)} dimensions; give it a batch dimension")
    stride, padding, dilation = ([*v] * rank if len(v) == 1 else [*v] for v in (stride, padding, dilation))
    x, weight = converted(x, meet), converted(weight, meet)
    bias = None if bias is None else converted(bias, meet)
    if not transposed:
        of = lowering.factors(node.args[0], node.args[1], 0, Factors(x, weight))
        made = convolution(lowering, node, of, bias, stride, padding, dilation, groups)
        if made is not None:
            return as_asked(node, made)
    if transposed:
        outer = [*output_padding] * rank if len(output_padding) == 1 else [*output_padding]
        x, weight = _transposed(lowering, x, weight, stride, padding, dilation, outer, groups)
        stride, padding = [1] * rank, [0] * rank
    before = [0, 0, *padding]
    x = padded(lowering, x, before, before, 0)
    found = _windows_times(lowering, x, weight, stride, dilation, groups, shape)
    if bias is not None:
        plain, added = found, bias
        found = plain.view(shape, lambda index: plain.at(index) + added.at([index[1]]), 1)
    return converted(found, dtype)


def _windows_times(
    lowering: Lowering, x: Value, weight: Value, stride: Sequence[int], dilation: Sequence[int], groups: int,
    shape: Sequence[Any],
) -> Value:  # fmt: skip
    """Multiply filters `[groups, out, in * window]` by windows `[batch * groups, in * window, pixels]`."""
    batch, channels = shape[0], shape[1]
    inputs, window, pixels = weight.shape[1], weight.shape[2:], shape[2:]
    depth = inputs * product(window)
    each = channels // groups
    x = lowering.ready(x)
    one_by_one = product(window) == 1 and all(s == 1 for s in stride)

    def at(index: Sequence[Any]) -> Any:
        where, row, column = index
        image, group = position(where, (batch, groups))
        channel, *offsets = position(row, (inputs, *window))
        out = position(column, pixels)
        places = [o * s + k * d for o, s, k, d in zip(out, stride, offsets, dilation, strict=True)]
        return x.at([image, group * inputs + channel, *places])

    if one_by_one:
        windows = lowering.reshape(x, (batch * groups, inputs, product(pixels)))
    else:
        windows = Value((batch * groups, depth, product(pixels)), x.dtype, at, cost=x.cost + 2, simd=x.simd)
    filters = lowering.reshape(weight, (groups, each, depth))
    if not (isinstance(batch, int) and batch == 1):
        few = filters
        filters = few.view(
            (batch * groups, each, depth), lambda i: few.at([position(i[0], (batch, groups))[1], i[1], i[2]])
        )
    found = multiply(lowering, filters, windows, "convolve")
    return lowering.reshape(found, shape)


def _transposed(
    lowering: Lowering, x: Value, weight: Value, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], outer: Sequence[int], groups: int,
) -> tuple[Value, Value]:  # fmt: skip
    """Turn it into an ordinary convolution: zeros between the inputs, filters turned around."""
    inputs, each, *window = weight.shape
    reach = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    before = [r - p for r, p in zip(reach, padding, strict=True)]
    after = [r - p + o for r, p, o in zip(reach, padding, outer, strict=True)]
    spread = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
    if any(s > 1 for s in stride):
        shape = (*x.shape[:2], *spread)
        parts: Any = [
            (constant(0, shape, x.dtype), lambda index: index),
            (x, lambda index: [*index[:2], *(i * s for i, s in zip(index[2:], stride, strict=True))]),
        ]
        x = assemble(lowering, shape, x.dtype, parts, "spread")
    x = padded(lowering, x, [0, 0, *before], [0, 0, *after], 0)
    per = inputs // groups

    def turned(index: Sequence[Any]) -> Any:
        out, inside, *offsets = index
        group, channel = position(out, (groups, each))
        back = [k - 1 - o for k, o in zip(window, offsets, strict=True)]
        return weight.at([group * per + inside, channel, *back])

    return x, lowering.settle(weight.view((groups * each, per, *window), turned, 1))


RULES: dict[Any, Callable[..., Any]] = {aten.convolution.default: _convolution}

"""Hand-written kernels in the place of operators: the one seam between codegen.general and codegen.dense_kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import tirx

from specqd.codegen.dense_kernels import (
    ConvSpec,
    Epilogue,
    GemmSpec,
    blocked_shape,
    conv2d,
    from_blocks,
    gemm,
    pack_channels,
    pack_conv,
    pack_gemm,
    to_blocks,
)
from specqd.codegen.general.lowering import End, Lowering
from specqd.codegen.general.values import Value

__all__ = ["blocked", "convolution", "linear", "planes"]

#: multiplications for which a matrix kernel is worth the time that LLVM takes for it, a second or two
LEAST = 1 << 18
#: channels up to which a convolution reads them as they are, and not in blocks
FEW = 4


def linear(
    lowering: Lowering, node: fx.Node | None, x: Value, weight: Value, bias: Value | None
) -> Value | None:
    """Return `x @ weight + bias`, and what follows it, for `x` `[m, k]` and a constant `weight` `[k, n]`.

    All float32; None for others. `node` is the operator whose result this is; None if more is done to the sums first.
    """
    m, k = x.shape
    n = weight.shape[1]
    if not _fits(x, weight, bias) or not isinstance(k, int) or 0 in (m, n, k):
        return None
    if lowering.work(m, n, k) < LEAST or (bias is not None and bias.shape != (n,)):
        return None
    end = End() if node is None else lowering.end(node, through_views=True)
    epilogue = Epilogue(bias is not None, end.residual is not None, end.activation)
    spec = GemmSpec(m if isinstance(m, int) else None, n, k, epilogue=epilogue)
    given = [lowering.settle(x), _stored(lowering, weight, "columns", lambda array: pack_gemm(spec, array.T))]
    if bias is not None:
        given.append(_stored(lowering, bias, "channels", pack_channels))
    if end.residual is not None:
        given.append(lowering.reshape(end.residual, (m, n)))
    return lowering.call(
        "linear", _private(gemm(spec, lowering.isa)), given, (m, n), "float32", 2 * lowering.work(m, n, k)
    )


def convolution(
    lowering: Lowering, node: fx.Node, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Value | None:  # fmt: skip
    """Return a convolution of two dimensions with a constant weight, and what follows it, in blocks of channels.

    All float32 and of static sizes; None for others.
    """
    static = all(isinstance(size, int) and size > 0 for size in x.shape)
    if len(weight.shape) != 4 or not static or not _fits(x, weight, bias):
        return None
    blocks = x.blocks
    if blocks is None and (x.shape[1] > FEW or groups > 1):
        blocks = _blocks(lowering, x)
    end = lowering.end(node, through_views=False)
    batch, channels, height, width = x.shape
    out, _, *kernel = weight.shape
    (down, right), (top, left), (rows, columns) = stride, padding, dilation
    spec = ConvSpec(
        batch, channels, height, width, out, (kernel[0], kernel[1]), (down, right), (top, left, top, left),
        (rows, columns), groups, planes=blocks is None,
        epilogue=Epilogue(bias is not None, end.residual is not None, end.activation),
    )  # fmt: skip
    form = f"planes {x.shape[2:]}" if blocks is None else f"blocks {groups}"
    given = [
        lowering.settle(blocks or x),
        _stored(lowering, weight, form, lambda array: pack_conv(spec, array)),
    ]
    if bias is not None:
        given.append(_stored(lowering, bias, "channels", pack_channels))
    shape = (batch, out, spec.out_height, spec.out_width)
    if end.residual is not None:
        residual = end.residual if end.residual.blocks else lowering.reshape(end.residual, shape)
        given.append(lowering.settle(residual.blocks or _blocks(lowering, residual)))
    found = lowering.call(
        "convolve", _private(conv2d(spec, lowering.isa)), given, blocked_shape(*shape, "float32"), "float32",
        2 * lowering.work(*shape, *weight.shape[1:]),
    )  # fmt: skip
    return blocked(found, shape)


def _fits(x: Value, weight: Value, bias: Value | None) -> bool:
    given = [x, weight] if bias is None else [x, weight, bias]
    constant = all(value.data is not None for value in given[1:])
    return constant and all(value.dtype == "float32" for value in given)


def _blocks(lowering: Lowering, x: Value) -> Value:
    """Put the channels of a tensor in blocks."""
    batch, channels, height, width = x.shape
    function = _private(to_blocks((batch, channels, height, width), "float32", lowering.isa))
    shape = blocked_shape(batch, channels, height, width, "float32")
    return lowering.call("to_blocks", function, [lowering.settle(x)], shape, "float32")


def blocked(blocks: Value, shape: Sequence[int]) -> Value:
    """Return the `[batch, channels, height, width]` that lies as `[batch, blocks, height, width, block]`.

    Lanes beyond the channels hold finite numbers, which every kernel that reads blocks passes over.
    """
    size = blocks.shape[-1]

    def at(index: Sequence[Any]) -> Any:
        channel = index[1]
        return blocks.at([index[0], tirx.floordiv(channel, size), *index[2:], tirx.floormod(channel, size)])

    return Value(tuple(shape), blocks.dtype, at, cost=blocks.cost, simd=blocks.simd, blocks=blocks)


def planes(lowering: Lowering, value: Value) -> Value:
    """Compute a value that lies in blocks of channels into a tensor in the order of its dimensions."""
    batch, channels, height, width = value.shape
    function = _private(from_blocks((batch, channels, height, width), "float32", lowering.isa))
    assert value.blocks is not None
    return lowering.call("from_blocks", function, [lowering.settle(value.blocks)], value.shape, "float32")


def _stored(lowering: Lowering, value: Value, form: str, change: Any) -> Value:
    assert value.data is not None
    made: np.ndarray = change(np.zeros(value.shape, np.float32))
    found = lowering.stored(value, form, change, made.shape)
    assert found is not None
    return found


def _private(function: Any) -> Any:
    """Leave the name to Relax, which may have several functions of one name."""
    return function.without_attr("global_symbol")

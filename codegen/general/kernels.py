"""Hand-written kernels in the place of operators: where codegen.general calls those of codegen.dense_kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import tirx

from specqd.codegen.dense_kernels import (
    ConvSpec,
    Epilogue,
    GemmSpec,
    Requantise,
    blocked_shape,
    by_winograd,
    conv2d,
    corrections,
    from_blocks,
    gemm,
    pack_channels,
    pack_conv,
    pack_gemm,
    to_blocks,
)
from specqd.codegen.dense_kernels.spec import PER_WORD, RANGE
from specqd.codegen.general.factors import Factors
from specqd.codegen.general.lowering import End, Lowering
from specqd.codegen.general.values import Value, stored

__all__ = ["blocked", "convolution", "linear", "planes"]

Pack = Callable[[np.ndarray], np.ndarray]

#: multiplications for which a matrix kernel is worth the time that LLVM takes for it, a second or two
LEAST = 1 << 18
#: channels up to which a convolution reads them as they are, and not in blocks
FEW = 4


def linear(lowering: Lowering, node: fx.Node | None, of: Factors, bias: Value | None) -> Value | None:
    """Return `x @ weight + bias`, and what follows it, for `x` `[m, k]` and a constant `weight` `[k, n]`.

    None for a product that no kernel fits. `node` is the operator whose result this is; None if more is done to the
    sums first.
    """
    m, k = of.x.shape
    n = of.weight.shape[1]
    if not _fits(of, bias) or not isinstance(k, int) or 0 in (m, n, k) or k % PER_WORD[of.dtype]:
        return None
    if lowering.work(m, n, k) < LEAST or (bias is not None and bias.shape != (n,)):
        return None
    end = End() if node is None else lowering.end(node, through_views=True, dtype=of.dtype)
    spec = GemmSpec(m if isinstance(m, int) else None, n, k, **_ending(of, bias, end))
    given = [
        lowering.settle(of.x),
        *_weights(
            lowering, of, end, "columns", spec, lambda array: pack_gemm(spec, array.T), lambda array: array.T
        ),
    ]
    if bias is not None:
        given.append(_stored(lowering, bias, "channels", pack_channels))
    if end.residual is not None:
        given.append(lowering.reshape(end.residual, (m, n)))
    function = _private(gemm(spec, lowering.isa, schedule=lowering.schedules(spec)))
    return lowering.call("linear", function, given, (m, n), end.dtype, 2 * lowering.work(m, n, k))


def convolution(
    lowering: Lowering, node: fx.Node, of: Factors, bias: Value | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Value | None:  # fmt: skip
    """Return a convolution of two dimensions with a constant weight, and what follows it, in blocks of channels.

    Of static sizes; None for one that no kernel fits.
    """
    x = of.x
    static = all(isinstance(size, int) and size > 0 for size in x.shape)
    if len(of.weight.shape) != 4 or not static or not _fits(of, bias):
        return None
    by_planes = x.blocks is None and x.shape[1] <= FEW and groups == 1
    given = [lowering.settle(x) if by_planes else _in_blocks(lowering, x)]
    end = lowering.end(node, through_views=False, dtype=of.dtype)
    batch, channels, height, width = x.shape
    out, _, *kernel = of.weight.shape
    (down, right), (top, left), (rows, columns) = stride, padding, dilation
    spec = ConvSpec(
        batch, channels, height, width, out, (kernel[0], kernel[1]), (down, right), (top, left, top, left),
        (rows, columns), groups, planes=by_planes, **_ending(of, bias, end),
    )  # fmt: skip
    form = f"planes {x.shape[2:]}" if by_planes else "winograd" if by_winograd(spec) else f"blocks {groups}"
    given += _weights(
        lowering, of, end, form, spec, lambda array: pack_conv(spec, array), lambda array: array
    )
    if bias is not None:
        given.append(_stored(lowering, bias, "channels", pack_channels))
    shape = (batch, out, spec.out_height, spec.out_width)
    if end.residual is not None:
        residual = end.residual if end.residual.blocks else lowering.reshape(end.residual, shape)
        given.append(_in_blocks(lowering, residual))
    function = _private(conv2d(spec, lowering.isa, schedule=lowering.schedules(spec)))
    flops = 2 * lowering.work(*shape, *of.weight.shape[1:])
    found = lowering.call("convolve", function, given, blocked_shape(*shape, end.dtype), end.dtype, flops)
    return blocked(found, shape)


def _fits(of: Factors, bias: Value | None) -> bool:
    constant = of.weight.data is not None and (bias is None or bias.data is not None)
    known = (
        of.dtype in RANGE if of.scale is not None else of.dtype == of.weight.dtype in ("float32", "bfloat16")
    )
    return constant and known and (bias is None or bias.dtype == "float32")


def _ending(of: Factors, bias: Value | None, end: End) -> dict[str, Any]:
    """What the specifications of convolutions and products have in common."""
    return {
        "dtype": of.dtype,
        "out_dtype": end.dtype,
        "epilogue": Epilogue(bias is not None, end.residual is not None, end.activation),
        "zero": of.zero,
        # Scales are an argument: layers of a network that differ in nothing else are one function.
        "requantise": Requantise(zero=end.requantise.zero),
        "open_steps": True,
    }


def _weights(
    lowering: Lowering, of: Factors, end: End, form: str, spec: ConvSpec | GemmSpec, pack: Pack, plain: Pack
) -> list[Value]:
    """The weight as the kernel reads it; of integers, then corrections and scales of its output channels, and steps.

    `plain` gives the weight with its output channels first.
    """
    packed = _stored(lowering, of.weight, form, pack)
    if of.scale is None or of.weight.data is None:
        return [packed]
    data, scale = of.weight.data, pack_channels(of.scale)

    def correction() -> np.ndarray:
        return corrections(spec, plain(data.contents.numpy()), lowering.isa)

    kind = f"{data.name}:{form} {of.dtype} {of.zero}"
    found = [
        packed,
        lowering.parameter(f"{kind} correction", scale.shape, "int32", correction),
        lowering.parameter(f"{kind} scale {float(of.scale.sum())!r}", scale.shape, "float32", lambda: scale),
    ]
    if end.dtype in RANGE:
        summand = end.summand or end.requantise
        steps = np.array([1 / end.requantise.scale, summand.scale, summand.zero], np.float32)
        found.append(lowering.parameter(f"steps {steps.tolist()}", (3,), "float32", lambda: steps))
    return found


def _in_blocks(lowering: Lowering, x: Value) -> Value:
    """Compute a tensor with its channels in the blocks of its dtype."""
    batch, channels, height, width = x.shape
    shape = blocked_shape(batch, channels, height, width, x.dtype)
    if x.blocks is not None and tuple(x.blocks.shape) == shape:
        return lowering.settle(x.blocks)
    function = _private(to_blocks((batch, channels, height, width), x.dtype, lowering.isa))
    return lowering.call("to_blocks", function, [lowering.settle(x)], shape, x.dtype)


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
    function = _private(from_blocks((batch, channels, height, width), value.dtype, lowering.isa))
    assert value.blocks is not None
    return lowering.call("from_blocks", function, [lowering.settle(value.blocks)], value.shape, value.dtype)


def _stored(lowering: Lowering, value: Value, form: str, change: Pack) -> Value:
    assert value.data is not None
    made = change(np.zeros(value.shape, stored(value.dtype)))
    found = lowering.stored(value, form, change, made.shape)
    assert found is not None
    return found


def _private(function: Any) -> Any:
    """Leave the name to Relax, which may have several functions of one name."""
    return function.without_attr("global_symbol")

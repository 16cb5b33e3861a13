"""Hand-written kernels in the place of operators: the one seam for them. There are none yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from tvm import tirx

from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.values import Value

__all__ = ["blocked", "convolution", "linear", "planes"]


def linear(lowering: Lowering, node: fx.Node, x: Value, weight: Value, bias: Value | None) -> Value | None:
    """Return `x @ weight + bias`, and what follows it, for `x` `[m, k]` and a constant `weight` `[k, n]`.

    None where no kernel does that; one that does takes `lowering.end` into it.
    """
    return None


def convolution(
    lowering: Lowering, node: fx.Node, x: Value, weight: Value, bias: Value | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Value | None:  # fmt: skip
    """Return a convolution of two dimensions with a constant weight, and what follows it, in blocks of channels.

    None where no kernel does that; one that does takes `lowering.end` into it.
    """
    return None


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
    return lowering.settle(value.view(value.shape, value.at))

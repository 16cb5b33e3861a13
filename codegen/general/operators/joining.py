"""Operators that put a tensor together from parts: concatenation, padding, writing into a slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specqd.codegen.dense_kernels import blocked_shape
from specqd.codegen.dense_kernels.spec import PER_WORD
from specqd.codegen.general.elementwise import write
from specqd.codegen.general.functions import INTEGERS
from specqd.codegen.general.kernels import blocked
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import dtype_of
from specqd.codegen.general.operators.views import shape_of
from specqd.codegen.general.values import Value, cast, const, converted, flat, i64
from specqd.codegen.tir import tirx

__all__ = ["RULES", "assemble", "constant", "padded"]

aten, prims = torch.ops.aten, torch.ops.prims

Place = Callable[[Sequence[Any]], Sequence[Any]]


def constant(value: Any, shape: Sequence[Any], dtype: str) -> Value:
    """A value that is the same everywhere; `value` is a number, or the TIR expression of one."""
    number = const(value, dtype) if isinstance(value, bool | int | float) else tirx.Cast(dtype, value)
    return Value(tuple(shape), dtype, lambda _: number)


def assemble(
    lowering: Lowering, shape: Sequence[Any], dtype: str, parts: Sequence[tuple[Value, Place]], name: str
) -> Value:
    """Write parts one after the other into a new tensor; a place gives where an index of the part goes."""

    def emit(kernel: Any, out: Any) -> None:
        for part, place in parts:
            if 0 not in part.shape:
                write(lowering, kernel, out, part, lambda index, place=place: flat(place(index), shape))  # type: ignore[misc]
        if all(0 in part.shape for part, _ in parts):
            from specqd.codegen.tir import I

            I.evaluate(i64(0))

    return lowering.launch(name, [(shape, dtype)], emit)[0]


def _whole(index: Sequence[Any]) -> Sequence[Any]:
    return index


def _shift(dim: int, begin: Any, step: int = 1) -> Place:
    return lambda index: [i * step + begin if d == dim else i for d, i in enumerate(index)]


def _cat(lowering: Lowering, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    # Codes of BF16 are joined as they are; see codes.move_codes.
    codes = node.meta["val"].dtype is torch.bfloat16
    shape, dtype = shape_of(lowering, node), "bfloat16" if codes else dtype_of(node.meta["val"].dtype)
    # An empty tensor of one dimension joins any other.
    tensors = [x for x in tensors if not (len(x.shape) == 1 and x.shape[0] == 0 and len(shape) > 1)]
    dim %= len(shape)
    parts, begin = [], 0
    for x in tensors:
        parts.append((converted(x, dtype), _shift(dim, begin)))
        begin = begin + x.shape[dim]
    if len(parts) == 1:
        return parts[0][0]
    if dim == 1 and len(shape) == 4 and any(x.blocks is not None for x in tensors):
        deep = _joined_blocks(lowering, [x for x, _ in parts], shape, dtype)
        if deep is not None:
            return deep
    return assemble(lowering, shape, dtype, parts, "concatenate")


def _joined_blocks(
    lowering: Lowering, tensors: Sequence[Value], shape: Sequence[Any], dtype: str
) -> Value | None:
    """Join channels in blocks.

    None for a dtype without blocks, and where lanes that are no channels would be written over others or be no numbers.
    """
    if dtype not in PER_WORD or not all(isinstance(size, int) for size in shape):
        return None
    batch, channels, height, width = shape
    whole = blocked_shape(batch, channels, height, width, dtype)
    size, begin = whole[-1], 0
    parts: list[tuple[Value, Place]] = []
    for x in tensors:
        source = x if x.blocks is None else x.blocks
        if x.blocks is not None and x.shape[1] % x.blocks.shape[-1]:
            return None
        parts.append((source, _into_blocks(begin, size, source.shape[-1] if x.blocks is not None else 0)))
        begin += x.shape[1]
    if begin % size and dtype not in INTEGERS:
        return None
    return blocked(assemble(lowering, whole, dtype, parts, "concatenate"), shape)


def _into_blocks(begin: int, size: int, lanes: int) -> Place:
    """Where an element of a part whose channels begin at `begin` lies in blocks; `lanes` are its own blocks', or 0."""

    def place(index: Sequence[Any]) -> Sequence[Any]:
        channel = index[1] * lanes + index[4] + begin if lanes else index[1] + begin
        return [index[0], tirx.floordiv(channel, size), index[2], index[3], tirx.floormod(channel, size)]

    return place


def padded(lowering: Lowering, x: Value, before: Sequence[int], after: Sequence[int], value: Any) -> Value:
    """Surround a value with a constant; negative amounts cut off."""
    shape = [size + b + a for size, b, a in zip(x.shape, before, after, strict=True)]
    cut = [max(-b, 0) for b in before]
    inner = [size + min(b, 0) + min(a, 0) for size, b, a in zip(x.shape, before, after, strict=True)]
    core = x.view(inner, lambda index: x.at([i + c for i, c in zip(index, cut, strict=True)]))
    if all(amount <= 0 for amount in (*before, *after)):
        return core
    moved = [max(b, 0) for b in before]
    parts: list[tuple[Value, Place]] = [(constant(value, shape, x.dtype), _whole)]
    parts.append((core, lambda index: [i + m for i, m in zip(index, moved, strict=True)]))
    return assemble(lowering, shape, x.dtype, parts, "pad")


def _constant_pad(lowering: Lowering, node: fx.Node, x: Value, pad: Sequence[int], value: Any = 0) -> Value:
    rank = len(x.shape)
    before, after = [0] * rank, [0] * rank
    for k in range(len(pad) // 2):
        before[rank - 1 - k], after[rank - 1 - k] = pad[2 * k], pad[2 * k + 1]
    return padded(lowering, x, before, after, value)


def _slice_scatter(
    lowering: Lowering, node: fx.Node, x: Value, source: Value, dim: int = 0,
    start: Any = None, end: Any = None, step: int = 1,
) -> Value:  # fmt: skip
    from specqd.codegen.general.operators.views import _start

    dim %= len(x.shape)
    begin = _start(start, x.shape[dim])
    source = converted(source, x.dtype)
    parts: list[tuple[Value, Place]] = [(x, _whole), (source, _shift(dim, begin, step))]
    return assemble(lowering, x.shape, x.dtype, parts, "slice_scatter")


def _select_scatter(lowering: Lowering, node: fx.Node, x: Value, source: Value, dim: int, at: int) -> Value:
    dim %= len(x.shape)
    where = at + x.shape[dim] if at < 0 else at
    parts: list[tuple[Value, Place]] = [(x, _whole)]
    parts.append((converted(source, x.dtype), lambda index: [*index[:dim], i64(where), *index[dim:]]))
    return assemble(lowering, x.shape, x.dtype, parts, "select_scatter")


def _full(lowering: Lowering, node: fx.Node, *given: Any, **_: Any) -> Value:
    return constant(given[1], shape_of(lowering, node), dtype_of(node.meta["val"].dtype))


def _same_everywhere(value: int) -> Callable[..., Value]:
    def rule(lowering: Lowering, node: fx.Node, *_: Any, **__: Any) -> Value:
        return constant(value, shape_of(lowering, node), dtype_of(node.meta["val"].dtype))

    return rule


def _scalar_tensor(lowering: Lowering, node: fx.Node, value: Any, **_: Any) -> Value:
    return constant(value, (), dtype_of(node.meta["val"].dtype))


def _arange(lowering: Lowering, node: fx.Node, start: Any, end: Any, step: Any = 1, **_: Any) -> Value:
    return _steps(lowering, node, start, step)


def _arange_from_zero(lowering: Lowering, node: fx.Node, end: Any, **_: Any) -> Value:
    return _steps(lowering, node, 0, 1)


def _arange_from(lowering: Lowering, node: fx.Node, start: Any, end: Any, **_: Any) -> Value:
    return _steps(lowering, node, start, 1)


def _iota(lowering: Lowering, node: fx.Node, length: Any, *, start: Any, step: Any, **_: Any) -> Value:
    return _steps(lowering, node, start, step)


def _steps(lowering: Lowering, node: fx.Node, start: Any, step: Any) -> Value:
    dtype = dtype_of(node.meta["val"].dtype)
    meet = "float64" if dtype.startswith(("float", "bfloat")) else "int64"

    def number(value: Any) -> Any:
        return const(value, meet) if isinstance(value, int | float) else tirx.Cast(meet, value)

    def at(index: Sequence[Any]) -> Any:
        return cast(number(start) + tirx.Cast(meet, index[0]) * number(step), meet, dtype)

    return Value(shape_of(lowering, node), dtype, at, cost=1)


RULES: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _constant_pad,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.full.default: _full,
    aten.full_like.default: _full,
    aten.new_full.default: lambda lo, node, x, size, value, **_: _full(lo, node, size, value),
    aten.fill.Scalar: _full,
    # What is in an empty tensor is nobody's business.
    aten.empty.memory_format: _same_everywhere(0),
    aten.empty_like.default: _same_everywhere(0),
    aten.empty_permuted.default: _same_everywhere(0),
    aten.empty_strided.default: _same_everywhere(0),
    aten.new_empty.default: _same_everywhere(0),
    aten.zeros.default: _same_everywhere(0),
    aten.zeros_like.default: _same_everywhere(0),
    aten.new_zeros.default: _same_everywhere(0),
    aten.ones.default: _same_everywhere(1),
    aten.ones_like.default: _same_everywhere(1),
    aten.new_ones.default: _same_everywhere(1),
    aten.scalar_tensor.default: _scalar_tensor,
    aten.arange.start_step: _arange,
    aten.arange.start: _arange_from,
    aten.arange.default: _arange_from_zero,
    prims.iota.default: _iota,
}

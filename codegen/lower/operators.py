"""Operators that cost work: how each becomes phases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import specqd.ops  # noqa: F401  (registers torch.ops.specqd)
from specqd.codegen import maths
from specqd.codegen.kernels.dense import BLOCK
from specqd.codegen.kernels.norm import mean_and_rstd, rstd
from specqd.codegen.lower.attending import cached_attention
from specqd.codegen.lower.products import PRODUCTS
from specqd.codegen.lower.stored import users
from specqd.codegen.lower.values import Index, Value, ravel
from specqd.codegen.lower.views import reshape
from specqd.codegen.pack import Packed
from specqd.codegen.tir import I, f32, i32, local, parallel, tirx
from specqd.errors import CodegenError

__all__ = ["OPERATORS"]

aten, ops = torch.ops.aten, torch.ops.specqd
#: elements up to which every thread computes row statistics for itself instead of waiting for a phase
_PRIVATE = 8192


def _embedding(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    table, ids = node.args[0], f.argument(node.args[1])
    stored = f.program.weights[str(table.target)]
    n, k = stored.shape
    bf16 = stored.dtype == torch.bfloat16 and k % 2 == 0
    if any(f.is_matrix(u) for u in users(f, table)):
        # The matrix kernels' copy of a tied table serves the lookup too: one copy in memory.
        dtype, size = ("int32", k // 2) if bf16 else ("float32", k)
        form = "bf16" if bf16 else "f32"
        size_padded = -(-n // BLOCK) * BLOCK * size
        buffer, offset = f.step.weight(Packed(f.sources(table), form, dtype, size_padded), gathered=True)

        def packed(index: Index) -> Any:
            row, c = ids.at(index[:-1]), index[-1]
            step = tirx.floordiv(c, i32(2)) if bf16 else c
            word = buffer[offset + (tirx.floordiv(row, i32(BLOCK)) * size + step) * BLOCK + row % BLOCK]
            if not bf16:
                return word
            low, high = tirx.shift_left(word, i32(16)), tirx.bitwise_and(word, i32(-65536))
            return tirx.reinterpret("float32", tirx.Select(tirx.floormod(c, i32(2)) == 0, low, high))

        return Value(tuple(node.meta["val"].shape), "float32", packed, vectorises=False)
    dtype, form = ("int16", "rows") if bf16 else ("float32", "flat")
    buffer, offset = f.step.weight(Packed(f.sources(table), form, dtype, n * k), gathered=True)

    def rows(index: Index) -> Any:
        word = buffer[offset + ids.at(index[:-1]) * k + index[-1]]
        if not bf16:
            return word
        return tirx.reinterpret("float32", tirx.shift_left(tirx.Cast("int32", word), i32(16)))

    return Value(tuple(node.meta["val"].shape), "float32", rows, vectorises=False)


def _statistics(f: Any, x: Value, count: int, compute: Callable[[Any], tuple[Any, ...]]) -> list[Any]:
    """Compute `count` numbers a row of plain `x`: by every thread for itself when small, else in a phase."""
    rows = x.size // x.shape[-1]
    private = x.size <= _PRIVATE
    buffers = [local(rows, "float32") if private else f.step.scratch(rows, "float32") for _ in range(count)]

    def row(r: Any) -> None:
        for buffer, value in zip(buffers, compute(r), strict=True):
            I.buffer_store(buffer, value, [r])

    if private:
        f.step.private_read(x.buffer)
        with I.serial(0, rows) as r:
            row(r)
    else:
        with f.step.phase(), parallel(rows) as r:
            row(r)
    return buffers


def _rms_norm(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    x, weight, eps, offset = node.args
    x = f.step.materialise(f.argument(x))
    size = x.shape[-1]
    (scale,) = _statistics(f, x, 1, lambda r: (rstd(f.isa, size, x.buffer, x.offset + r * size, eps),))
    gain = f.argument(weight) if weight is not None else None

    def at(index: Index) -> Any:
        y = x.at(index) * scale[f.space.simplify(ravel(index[:-1], x.shape[:-1]))]
        if gain is None:
            return y
        factor = gain.at([index[-1]])
        return y * (factor if offset == 0.0 else f32(offset) + factor)

    return Value(x.shape, "float32", at, vectorises=x.vectorises)


def _layer_norm(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    if len(shape) != 1:
        raise CodegenError(f"layer_norm over {len(shape)} dimensions is not supported, only over the last")
    x = f.step.materialise(f.argument(x))
    size = x.shape[-1]
    mean, scale = _statistics(
        f, x, 2, lambda r: mean_and_rstd(f.isa, size, x.buffer, x.offset + r * size, eps)
    )
    gain, shift = (f.argument(w) if w is not None else None for w in (weight, bias))

    def at(index: Index) -> Any:
        r = f.space.simplify(ravel(index[:-1], x.shape[:-1]))
        y = (x.at(index) - mean[r]) * scale[r]
        y = y if gain is None else y * gain.at([index[-1]])
        return y if shift is None else maths.add(y, shift.at([index[-1]]))

    return Value(x.shape, "float32", at, vectorises=x.vectorises)


def _mean(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    value, dims = f.argument(node.args[0]), node.args[1]
    if [d % len(value.shape) for d in dims] != [len(value.shape) - 1]:
        raise CodegenError(f"mean over dimensions {list(dims)} is not supported, only over the last")
    x = f.step.materialise(value)
    size = x.shape[-1]
    (mean,) = _statistics(
        f, x, 1, lambda r: mean_and_rstd(f.isa, size, x.buffer, x.offset + r * size, 0.0)[:1]
    )
    lead = x.shape[:-1]
    rows = Value(
        (*lead, 1), "float32", lambda index: mean[f.space.simplify(ravel(index[:-1], lead))], vectorises=True
    )
    return reshape(f.space, rows, tuple(node.meta["val"].shape))


def _rope(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    x, cos, sin = (f.argument(a) for a in node.args)
    turned = cos.shape[-1]
    half = turned // 2

    def at(index: Index) -> Any:
        d = index[-1]
        if f.space.proves(d >= turned):
            return x.at(index)
        angle = [i32(0), index[2], d]

        def rotate(shift: int, sign: float) -> Any:
            other = x.at([*index[:-1], f.space.simplify(d + shift)])
            return maths.fma(x.at(index), cos.at(angle), other * (sin.at(angle) * f32(sign)))

        if f.space.proves(d < half):
            return rotate(half, -1.0)
        if f.space.proves(tirx.all(d >= half, d < turned)):
            return rotate(-half, 1.0)
        raise CodegenError("rope was asked for channels across its halves")

    breaks = frozenset(b for b in (half, turned) if b < x.shape[-1]) | x.breaks
    return Value(x.shape, "float32", at, breaks=breaks, vectorises=x.vectorises)


def _among_all(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    x, places = f.step.materialise(f.argument(node.args[0])), f.argument(node.args[1])

    def at(index: Index) -> Any:
        place = places.at([index[-1]])
        known = x.at([*index[:-1], tirx.max(place, i32(0))])
        return tirx.Select(place < 0, tirx.const(-math.inf, "float32"), known)

    return Value(tuple(node.meta["val"].shape), "float32", at, vectorises=False)


#: operator -> function(lowering, node, epilogue chain) giving its value
OPERATORS: dict[Any, Callable[[Any, fx.Node, list[fx.Node]], Value]] = {
    **PRODUCTS,
    aten.embedding.default: _embedding,
    ops.rms_norm.default: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    aten.mean.dim: _mean,
    ops.rope.default: _rope,
    ops.cached_attention.default: cached_attention,
    ops.among_all.default: _among_all,
}

"""Packs an activation that is the second operand of a product, as `layout.pack_gemm` packs a weight."""

from __future__ import annotations

from typing import Any

from specqd.codegen.dense_kernels.layout import OUT
from specqd.codegen.dense_kernels.spec import GemmSpec
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, f32, load, splat, store, tirx

__all__ = ["pack_activation", "transposed"]


def pack_activation(spec: GemmSpec, isa: ISA, second: Any, packed: Any, part: Any) -> None:
    """Pack `[k, 16]` of float32 `[batch, k, n]` (or `[batch, n, k]`): a part of `[batch * blocks of n, k, 16]`."""
    blocks = -(-spec.n // OUT)
    batch, first = bind(part // blocks), bind(part % blocks * OUT)
    to = bind(part * (spec.k * OUT))
    rest = spec.n % OUT
    if not rest:
        _block(spec, isa, second, packed, (batch, first, to), OUT)
        return
    with I.If(first + OUT <= spec.n):
        with I.Then():
            _block(spec, isa, second, packed, (batch, first, to), OUT)
        with I.Else():
            _block(spec, isa, second, packed, (batch, first, to), rest)


def _block(
    spec: GemmSpec, isa: ISA, second: Any, packed: Any, where: tuple[Any, Any, Any], width: int
) -> None:
    batch, first, to = where
    if not spec.transposed:
        at = bind(batch * (spec.k * spec.n) + first)
        with I.serial(0, spec.k) as k:
            for v in range(0, OUT, isa.lanes):
                _row(isa, second, at + k * spec.n + v, packed, to + k * OUT + v, min(isa.lanes, width - v))
        return
    lanes = isa.lanes
    for v in range(0, OUT, lanes):
        at = bind((batch * spec.n + first + v) * spec.k)
        whole = spec.k // lanes * lanes if v + lanes <= width else 0
        if whole:
            with I.serial(0, whole // lanes) as s:
                rows = [bind(load(second, at + i * spec.k + s * lanes, lanes)) for i in range(lanes)]
                for i, column in enumerate(transposed(rows)):
                    store(packed, to + (s * lanes + i) * OUT + v, column, lanes)
        if whole < spec.k:
            with I.serial(whole, spec.k) as k:
                for i in range(lanes):
                    value = second[at + i * spec.k + k] if v + i < width else f32(0.0)
                    store(packed, to + k * OUT + v + i, value, 1)


def _row(isa: ISA, second: Any, at: Any, packed: Any, to: Any, width: int) -> None:
    if width == isa.lanes:
        store(packed, to, load(second, at, width), width)
        return
    store(packed, to, splat(f32(0.0), isa.lanes), isa.lanes)
    for i in range(width):
        store(packed, to + i, second[at + i], 1)


def transposed(rows: list[Any]) -> list[Any]:
    """Transpose as many vectors as they have lanes: each stage exchanges a bit of row and lane numbers."""
    lanes = len(rows)
    step = lanes // 2
    while step:
        low = [lane if not lane & step else lane - step + lanes for lane in range(lanes)]
        high = [lane + step if not lane & step else lane + lanes for lane in range(lanes)]
        after = list(rows)
        for i in (i for i in range(lanes) if not i & step):
            a, b = rows[i], rows[i + step]
            after[i] = bind(tirx.Shuffle([a, b], low))
            after[i + step] = bind(tirx.Shuffle([a, b], high))
        rows = after
        step //= 2
    return rows

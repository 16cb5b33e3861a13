"""Matrix times a few to many rows, weights in BF16 or float32: the kernels that read memory at its speed.

Weights lie in blocks of 16 output channels, input channels (pairs of them for BF16) outside, the block's 16 lanes
inside, so one block streams from memory in order. Every output is one chain of fused multiply-adds over the input
channels in order: its bits do not depend on how many rows are computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.tiles import INPUTS, tiled
from specqd.codegen.kernels.tiling import row_tiles, tasks
from specqd.codegen.sparse_kernels.reading import Sparse
from specqd.codegen.tir import I, f32, load, local, parallel, prefetch, splat, store, tirx

__all__ = ["BLOCK", "dense", "tile"]

#: output channels in a block
BLOCK = 16

#: finish(row, first channel of the block, accumulators, their offset): writes one row of one block
Finish = Callable[[Any, Any, Any, Any], None]


def dense(
    isa: ISA,
    rows: int,
    n: int,
    k: int,
    x: Any,
    weight: Any,
    offset: Any,
    kind: str,
    finish: Finish,
    phase: Any,
    space: Any,
) -> None:
    """Emit one phase computing `x [rows, k] @ weight.T [k, n]`.

    `kind` is "bf16" (weight int32 `[n/16, k/2, 16]`) or "f32" (float32 `[n/16, k, 16]`), `offset` its first
    element, or a `Sparse` matrix; x is float32, or int32 BF16 pairs when `isa.pairs` and kind is "bf16". `k` is even
    for "bf16".
    """
    if isa.tiles and kind == "bf16" and k % INPUTS == 0:
        tiled(rows, n, k, x, weight, offset, finish, phase, space)
        return
    steps = k // 2 if kind == "bf16" else k
    blocks = -(-n // BLOCK)
    limit = max(1, isa.accumulators * isa.lanes // BLOCK)
    with phase():
        for start, count, width in tasks(blocks, rows, limit):
            with parallel(count) as b:
                first = start + b * width
                tiles = list(row_tiles(rows, max(1, limit // width)))
                ahead = _Ahead(first, width, steps, sum(repeat for _, repeat in tiles))
                done = 0
                for (row, size), repeat in tiles:
                    with I.serial(0, repeat) as t:
                        space.bound(t, repeat)
                        base = space.simplify(row + t * size)
                        ahead.tile = done + t
                        tile(
                            isa, kind, steps, first, width, base, size, x, weight, offset, finish, ahead.line
                        )
                    done += repeat


class _Ahead:
    """Which cache line to ask for while another is computed on."""

    #: lines that one tile's stream is kept ahead: a page, where the CPU's own prefetch stops
    LINES = 64

    def __init__(self, first: Any, width: int, steps: int, tiles: int) -> None:
        self.first, self.width, self.steps, self.tiles = first, width, steps, tiles
        self.tile: Any = 0

    def line(self, block: int, step: Any) -> Any:
        """Line (16 lanes of 4 bytes) to ask for at `step` of the task's `block`-th block."""
        if self.tiles == 1:
            return (self.first + block) * self.steps + step + self.LINES
        # Later tiles find this block in the cache; memory is free to bring the next task's meanwhile.
        return (self.first + self.width + block) * self.steps + (self.tile * self.steps + step) // self.tiles


def tile(
    isa: ISA,
    kind: str,
    steps: int,
    first: Any,
    width: int,
    base: Any,
    rows: int,
    x: Any,
    weight: Any,
    offset: Any,
    finish: Finish,
    ahead: Callable[[int, Any], Any],
) -> None:
    """Emit `width` blocks of `rows` rows, from `first` and `base` on; `ahead(block, step)` is a line to ask for."""
    lanes, vectors = isa.lanes, BLOCK // isa.lanes
    acc = [local(width * BLOCK, "float32") for _ in range(rows)]
    for row in acc:
        for i in range(width * vectors):
            store(row, i * lanes, splat(f32(0.0), lanes), lanes)
    read = _reading(isa, kind, steps, first, width, weight, offset, ahead)
    with I.serial(0, steps) as s:
        inputs = [_inputs(isa, kind, x, (base + m) * steps + s) for m in range(rows)]
        for j in range(width):
            for v in range(vectors):
                w = read(j, s, v)
                w = isa.bf16_prepare(w) if kind == "bf16" else I.bind(w)
                for m in range(rows):
                    i = j * BLOCK + v * lanes
                    old = load(acc[m], i, lanes)
                    if kind == "bf16":
                        new = isa.bf16_dot(old, w, inputs[m])
                    else:
                        new = isa.fma(w, splat(inputs[m], lanes), old)
                    store(acc[m], i, new, lanes)
    for m in range(rows):
        for j in range(width):
            finish(base + m, (first + j) * BLOCK, acc[m], j * BLOCK)


def _reading(
    isa: ISA,
    kind: str,
    steps: int,
    first: Any,
    width: int,
    weight: Any,
    offset: Any,
    ahead: Callable[[int, Any], Any],
) -> Callable[[int, Any, int], Any]:
    """Return what reads the weights of the task's `block`-th block at a step: `read(block, step, vector)`."""
    if isinstance(weight, Sparse):
        readers = [weight.reader(first + j) for j in range(width)]
        dtype = f"{'int32' if kind == 'bf16' else 'float32'}x{isa.lanes}"

        def expanded(block: int, step: Any, _: int) -> Any:
            (vector,) = readers[block].vectors((first + block) * steps + step, 1)
            return tirx.reinterpret(dtype, vector)

        return expanded

    def loaded(block: int, step: Any, vector: int) -> Any:
        if vector == 0:
            prefetch(weight, offset + ahead(block, step) * BLOCK)
        at = offset + ((first + block) * steps + step) * BLOCK + vector * isa.lanes
        return load(weight, at, isa.lanes)

    return loaded


def _inputs(isa: ISA, kind: str, x: Any, at: Any) -> Any:
    if kind == "f32" or isa.pairs:
        return x[at]
    return x[at * 2], x[at * 2 + 1]

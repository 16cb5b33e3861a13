"""Causal attention over the KV cache: which queries share the keys that are loaded, and which task computes what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.cache import Paged
from specqd.codegen.kernels.queries import Attention, Queries
from specqd.codegen.kernels.tiling import THREADS
from specqd.codegen.tir import I, bind, i32, parallel, tirx
from specqd.manifest import BLOCK

__all__ = ["attention", "query_tile"]


def attention(
    isa: ISA,
    a: Attention,
    q: Any,
    cache: Paged,
    sinks: Callable[[Any], Any] | None,
    out: Any,
    phase: Any,
    totals: Any = None,
) -> None:
    """Emit one phase: `q` float32 `[rows, heads, 2 * pairs]` -> `out` float32 `[rows, heads, value_dim]`.

    `sinks(head)` gives a head's sink score. `totals`, float32 `[rows, heads, 2]`, gets each query's highest score and
    one over the sum of its weights relative to it.
    """
    width, heads, rows = query_tile(isa, a)
    tiles, last = -(-a.rows // rows), a.rows - rows
    group = a.heads // a.kv_heads
    with phase(), parallel(tiles * a.kv_heads * heads) as u:
        row, head = u // (a.kv_heads * heads) * rows, (u // heads) % a.kv_heads
        first = head * group + (u % heads) * width
        # The last tile overlaps the one before: both compute the same bits for a shared head or row.
        if group % width:
            first = tirx.min(first, (head + 1) * group - width)
        row = bind(tirx.min(row, i32(last)) if a.rows % rows else row)
        scores = None if sinks is None else [sinks(first + g) for g in range(width)]

        def attend(row: Any, count: int) -> None:
            queries = bind(row * a.heads + first)
            plane = bind(cache.layer * a.kv_heads + head)
            Queries(isa, a, (count, width), queries, cache, plane, row).run(q, scores, out, totals)

        if rows == 1 or (a.adjacent and not a.by_block):
            attend(row, rows)
            return
        together = []
        if not a.adjacent:
            together += [
                tirx.all(
                    cache.tables[row + r] == cache.tables[row],
                    cache.positions[row + r] == cache.positions[row] + r,
                )
                for r in range(1, rows)
            ]
        if a.by_block:
            together.append(cache.positions[row] % BLOCK <= BLOCK - rows)
        with I.If(tirx.all(*together)):
            with I.Then():
                attend(row, rows)
            with I.Else(), I.serial(0, rows) as r:
                attend(bind(row + r), 1)


def query_tile(isa: ISA, a: Attention) -> tuple[int, int, int]:
    """Return query heads of a task, tasks a key head, and rows of a task: they share each key that is loaded."""
    group = a.heads // a.kv_heads
    limit = max(1, isa.accumulators * isa.lanes // BLOCK)
    heads = -(-group // limit)
    width = -(-group // heads)

    def cost(rows: int) -> float:
        tasks = -(-a.rows // rows) * a.kv_heads * heads
        # Loading and widening a vector costs about as much as multiplying it with three queries.
        return -(-tasks // THREADS) * (3 + rows * width)

    sizes = [r for r in range(1, min(a.rows, max(1, limit // width)) + 1) if not a.by_block or BLOCK % r == 0]
    return width, heads, min(sizes, key=cost)

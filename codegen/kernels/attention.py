"""Causal attention over the KV cache, in chunks of positions with a running softmax.

A cache is made of planes, one for each layer and key head; a plane of blocks of 16 positions, in any order: a table
says where the blocks of a sequence lie. Keys lie in a block with pairs of channels outside, positions inside (BF16
pairs in one int32), so a block of scores is a small matrix kernel without horizontal sums; values lie position by
position. Chunks start at multiples of `CHUNK`, whatever the query, so a row's bits depend on its position alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specqd.codegen import maths
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.tiling import THREADS
from specqd.codegen.tir import I, bind, f32, i32, intrinsic, load, local, parallel, splat, store, tirx
from specqd.manifest import BLOCK

__all__ = ["CHUNK", "Attention", "Paged", "Unit", "attention", "query_tile"]

#: positions between two rescalings of the running softmax
CHUNK = 128
_LOW = -1e30


@dataclass(frozen=True)
class Attention:
    """Shapes and options of one attention: `heads` queries over `kv_heads`.

    `adjacent`: the rows are known to be consecutive positions of one sequence.
    """

    rows: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    adjacent: bool = False
    window: int = 0
    softcap: float = 0.0

    @property
    def pairs(self) -> int:
        """Channel pairs of a key."""
        return -(-self.key_dim // 2)


@dataclass(frozen=True)
class Paged:
    """One layer of a paged cache, and where each row stands.

    `keys` int32, `values` int16, each `pool` blocks a plane; `blocks` int32 holds the tables, `tables` int32 `[rows]`
    where in it those of each row begin, `positions` int32 `[rows]` each row's place in its sequence. First comes how
    far the table of a plane is from that of the plane before (0: they share one), counted from the model's first, of
    which this cache has those from `first` on. A table begins with how many positions of the sequence are not
    in the cache any more; then come the blocks of those that are, in order: its slots.
    """

    keys: Any
    values: Any
    pool: Any
    layer: Any
    blocks: Any
    tables: Any
    positions: Any
    first: int = 0

    def stand(self, plane: Any, row: Any) -> tuple[Any, Any]:
        """Return where the row's table for a plane begins, and the row's slot."""
        begin = bind(self.tables[row])
        table = bind(begin + 1 + (plane + self.first) * self.blocks[begin])
        return table, bind(self.positions[row] - self.blocks[table])

    def block(self, plane: Any, table: Any, index: Any) -> Any:
        """Where block `index` of a table lies in a plane, counted in blocks from the buffer's begin."""
        return plane * self.pool + self.blocks[table + 1 + index]


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
            Unit(isa, a, (count, width), queries, cache, plane, row).run(q, scores, out, totals)

        if rows == 1 or a.adjacent:
            attend(row, rows)
            return
        together = [
            tirx.all(
                cache.tables[row + r] == cache.tables[row],
                cache.positions[row + r] == cache.positions[row] + r,
            )
            for r in range(1, rows)
        ]
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

    return width, heads, min(range(1, min(a.rows, max(1, limit // width)) + 1), key=cost)


class Unit:
    """Queries that share a key head: `width` heads of each of some consecutive positions of one sequence.

    `query` is the first of them, `row` the row it belongs to; `plane` is the layer's key head. Positions that only
    later rows see are masked in the earlier ones, where they weigh exactly nothing.
    """

    def __init__(
        self, isa: ISA, a: Attention, shape: tuple[int, int], query: Any, cache: Paged, plane: Any, row: Any
    ) -> None:
        self.isa, self.a, self.cache, self.plane = isa, a, cache, plane
        self.rows, self.width = shape
        self.queries = [query + (r * a.heads + g) for r in range(self.rows) for g in range(self.width)]
        self.table, self.slot = cache.stand(plane, row)
        self.scores = [local(CHUNK, "float32") for _ in self.queries]
        self.mixed = [local(a.value_dim, "float32") for _ in self.queries]
        self.top, self.total = (local(len(self.queries), "float32") for _ in range(2))

    def run(self, q: Any, sinks: list[Any] | None, out: Any, totals: Any = None) -> None:
        """Attend to every position that a row sees, chunk by chunk."""
        self.begin(sinks)
        oldest = tirx.max(self.slot - (self.a.window - 1), i32(0)) if self.a.window else i32(0)
        begin = bind(oldest // CHUNK)
        newest = bind(self.slot + (self.rows - 1))
        with I.serial(0, newest // CHUNK + 1 - begin) as c:
            base = bind((begin + c) * CHUNK)
            count = bind(tirx.min(newest + 1 - base, i32(CHUNK)))
            self.score(q, base, count)
            self.soften(base, count)
            self.mix(base, count)
        self.finish(out, totals)

    def begin(self, sinks: list[Any] | None) -> None:
        """Start with nothing seen but the sink, which takes weight and gives nothing."""
        for g, mixed in enumerate(self.mixed):
            I.buffer_store(self.top, f32(_LOW) if sinks is None else sinks[g % self.width], [g])
            I.buffer_store(self.total, f32(0.0 if sinks is None else 1.0), [g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(mixed, f32(0.0), [d])

    def score(self, q: Any, base: Any, count: Any) -> None:
        """Multiply the queries with `count` keys from position `base`."""
        limit = max(1, self.isa.accumulators * self.isa.lanes // BLOCK)
        # Few queries take several blocks at a time, to have enough independent sums.
        wide = min(4, max(1, limit // len(self.queries)))
        blocks = bind((count + (BLOCK - 1)) // BLOCK)
        with I.serial(0, blocks // wide) as b:
            self._score_blocks(q, base, b * wide, wide)
        if wide > 1:
            with I.serial(0, blocks % wide) as b:
                self._score_blocks(q, base, blocks // wide * wide + b, 1)

    def _score_blocks(self, q: Any, base: Any, first: Any, wide: int) -> None:
        isa, a, lanes = self.isa, self.a, self.isa.lanes
        span = wide * BLOCK
        acc = [local(span, "float32") for _ in self.queries]
        for head in acc:
            for v in range(0, span, lanes):
                store(head, v, splat(f32(0.0), lanes), lanes)
        index = bind(base // BLOCK + first)
        blocks = [
            bind(self.cache.block(self.plane, self.table, index + b) * (a.pairs * BLOCK)) for b in range(wide)
        ]
        with I.serial(0, a.pairs) as d:
            for v in range(0, span, lanes):
                at = blocks[v // BLOCK] + v % BLOCK + d * BLOCK
                words = bind(load(self.cache.keys, at, lanes))
                low = bind(_float(tirx.shift_left(words, splat(i32(16), lanes)), lanes))
                high = bind(_float(tirx.bitwise_and(words, splat(i32(-65536), lanes)), lanes))
                for query, head in zip(self.queries, acc, strict=True):
                    at = query * (2 * a.pairs) + d * 2
                    even = isa.fma(low, splat(q[at], lanes), load(head, v, lanes))
                    store(head, v, isa.fma(high, splat(q[at + 1], lanes), even), lanes)
        for head, scores in zip(acc, self.scores, strict=True):
            # Indices are constants here, or LLVM would keep the sums in memory.
            for at in range(0, span, lanes):
                with I.vectorized(0, lanes) as v:
                    value = head[at + v] * f32(a.scale)
                    if a.softcap:
                        value = maths.tanh(value * f32(1 / a.softcap)) * f32(a.softcap)
                    I.buffer_store(scores, value, [first * BLOCK + at + v])

    def soften(self, base: Any, count: Any) -> None:
        """Turn scores into weights relative to the highest score so far, and shrink what came before to match."""
        isa, lanes = self.isa, self.isa.lanes
        steps = bind((count + (lanes - 1)) // lanes)
        for g, (scores, mixed) in enumerate(zip(self.scores, self.mixed, strict=True)):
            of_row = self.slot + g // self.width
            peak, sums = local(lanes, "float32"), local(lanes, "float32")
            store(peak, 0, splat(f32(_LOW), lanes), lanes)
            store(sums, 0, splat(f32(0.0), lanes), lanes)
            with I.serial(0, steps) as s, I.vectorized(0, lanes) as v:
                score = tirx.Select(
                    self.seen(base + s * lanes + v, of_row), scores[s * lanes + v], f32(_LOW)
                )
                I.buffer_store(peak, tirx.max(peak[v], score), [v])
            highest = bind(tirx.max(isa.reduce("fmax", load(peak, 0, lanes)), self.top[g]))
            shrink = bind(maths.exp(self.top[g] - highest))
            with I.serial(0, steps) as s, I.vectorized(0, lanes) as v:
                weight = maths.exp(scores[s * lanes + v] - highest)
                weight = tirx.Select(self.seen(base + s * lanes + v, of_row), weight, f32(0.0))
                I.buffer_store(scores, weight, [s * lanes + v])
                I.buffer_store(sums, sums[v] + scores[s * lanes + v], [v])
            total = maths.fma(self.total[g], shrink, isa.reduce("fadd", load(sums, 0, lanes)))
            I.buffer_store(self.total, total, [g])
            I.buffer_store(self.top, highest, [g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(mixed, mixed[d] * shrink, [d])

    def seen(self, slot: Any, of_row: Any) -> Any:
        """Say whether a row at one slot sees another."""
        if not self.a.window:
            return slot <= of_row
        return tirx.all(slot <= of_row, slot > of_row - self.a.window)

    def mix(self, base: Any, count: Any) -> None:
        """Add `count` values from position `base`, in order, each times its weight."""
        a, lanes = self.a, self.isa.lanes
        while a.value_dim % lanes:
            lanes //= 2
        span = max(1, min(self.isa.accumulators // len(self.queries), a.value_dim // lanes))
        while (a.value_dim // lanes) % span:
            span -= 1
        kind = f"float32x{lanes}" if lanes > 1 else "float32"
        with I.serial(0, a.value_dim // (lanes * span)) as tile:
            acc = [local(span * lanes, "float32") for _ in self.queries]
            for head, mixed in zip(acc, self.mixed, strict=True):
                for j in range(span):
                    store(head, j * lanes, load(mixed, (tile * span + j) * lanes, lanes), lanes)
            with I.serial(0, (count + (BLOCK - 1)) // BLOCK) as b:
                block = self.cache.block(self.plane, self.table, base // BLOCK + b)
                first = bind(block * (BLOCK * a.value_dim) + tile * (lanes * span))
                with I.serial(0, tirx.min(count - b * BLOCK, i32(BLOCK))) as t:
                    for j in range(span):
                        at = first + t * a.value_dim + j * lanes
                        wide = tirx.Cast(kind.replace("float", "int"), load(self.cache.values, at, lanes))
                        v = bind(_float(tirx.shift_left(wide, splat(i32(16), lanes)), lanes))
                        for head, weights in zip(acc, self.scores, strict=True):
                            weight = splat(weights[b * BLOCK + t], lanes)
                            new = intrinsic(kind, "llvm.fmuladd", v, weight, load(head, j * lanes, lanes))
                            store(head, j * lanes, new, lanes)
            for head, mixed in zip(acc, self.mixed, strict=True):
                for j in range(span):
                    store(mixed, (tile * span + j) * lanes, load(head, j * lanes, lanes), lanes)

    def finish(self, out: Any, totals: Any) -> None:
        """Divide by the total weight and store."""
        for g, (query, mixed) in enumerate(zip(self.queries, self.mixed, strict=True)):
            inverse = bind(f32(1.0) / self.total[g])
            if totals is not None:
                I.buffer_store(totals, self.top[g], [query * 2])
                I.buffer_store(totals, inverse, [query * 2 + 1])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(out, mixed[d] * inverse, [query * self.a.value_dim + d])


def _float(bits: Any, lanes: int) -> Any:
    return tirx.reinterpret(f"float32x{lanes}" if lanes > 1 else "float32", bits)

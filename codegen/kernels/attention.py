"""Causal attention over the KV cache, in chunks of positions with a running softmax.

Keys lie in blocks of 16 positions, pairs of channels outside, positions inside (BF16 pairs in one int32), so a block
of scores is a small matrix kernel without horizontal sums; values lie position by position. Chunks start at
multiples of `CHUNK`, whatever the query, so a row's bits depend on its position alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specqd.codegen import maths
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.tiling import THREADS
from specqd.codegen.tir import I, bind, f32, i32, intrinsic, load, local, parallel, splat, store, tirx

__all__ = ["CHUNK", "POSITIONS", "Attention", "attention"]

#: positions in a block of keys
POSITIONS = 16
#: positions between two rescalings of the running softmax
CHUNK = 128
_LOW = -1e30


@dataclass(frozen=True)
class Attention:
    """Shapes and options of one attention: `heads` queries over `kv_heads`, cache of `capacity` positions."""

    rows: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    capacity: int
    scale: float
    window: int = 0
    softcap: float = 0.0

    @property
    def pairs(self) -> int:
        """Channel pairs of a key."""
        return -(-self.key_dim // 2)


def attention(
    isa: ISA,
    a: Attention,
    q: Any,
    cache: tuple[Any, Any],
    layer: Any,
    start: Any,
    sinks: Any,
    out: Any,
    phase: Any,
) -> None:
    """Emit one phase: `q` float32 `[rows, heads, 2 * pairs]` -> `out` float32 `[rows, heads, value_dim]`.

    `start` is the position of the first row, `sinks(head)` gives a head's sink score (or None).
    """
    width, heads, rows = _tile(isa, a)
    tiles, last = -(-a.rows // rows), a.rows - rows
    group = a.heads // a.kv_heads
    with phase(), parallel(tiles * a.kv_heads * heads) as u:
        row, head = u // (a.kv_heads * heads) * rows, (u // heads) % a.kv_heads
        first = head * group + (u % heads) * width
        # The last tile overlaps the one before: both compute the same bits for a shared head or row.
        if group % width:
            first = tirx.min(first, (head + 1) * group - width)
        row = bind(tirx.min(row, i32(last)) if a.rows % rows else row)
        unit = _Unit(
            isa, a, (rows, width), bind(row * a.heads + first), bind(layer * a.kv_heads + head), start + row
        )
        unit.begin(None if sinks is None else [sinks(first + g) for g in range(width)])
        oldest = tirx.max(unit.position - (a.window - 1), i32(0)) if a.window else i32(0)
        begin = bind(oldest // CHUNK)
        newest = bind(unit.position + (rows - 1))
        with I.serial(0, newest // CHUNK + 1 - begin) as c:
            base = bind((begin + c) * CHUNK)
            count = bind(tirx.min(newest + 1 - base, i32(CHUNK)))
            unit.score(q, cache[0], base, count)
            unit.soften(base, count)
            unit.mix(cache[1], base, count)
        unit.finish(out)


def _tile(isa: ISA, a: Attention) -> tuple[int, int, int]:
    """Query heads of a task, tasks a key head, and rows of a task: together they share each key that is loaded."""
    group = a.heads // a.kv_heads
    limit = max(1, isa.accumulators * isa.lanes // POSITIONS)
    heads = -(-group // limit)
    width = -(-group // heads)

    def cost(rows: int) -> float:
        tasks = -(-a.rows // rows) * a.kv_heads * heads
        # Loading and widening a vector costs about as much as multiplying it with three queries.
        return -(-tasks // THREADS) * (3 + rows * width)

    return width, heads, min(range(1, min(a.rows, max(1, limit // width)) + 1), key=cost)


class _Unit:
    """Queries that share a key head: `width` heads of each of `rows` rows; `query` is the first of them.

    `plane` is the layer's key head, `position` that of the first row. Positions that only later rows see are
    masked in the earlier ones, where they weigh exactly nothing.
    """

    def __init__(
        self, isa: ISA, a: Attention, shape: tuple[int, int], query: Any, plane: Any, position: Any
    ) -> None:
        self.isa, self.a = isa, a
        rows, self.width = shape
        self.queries = [query + (r * a.heads + g) for r in range(rows) for g in range(self.width)]
        self.plane, self.position = plane, bind(position)
        self.scores = [local(CHUNK, "float32") for _ in self.queries]
        self.mixed = [local(a.value_dim, "float32") for _ in self.queries]
        self.top, self.total = (local(len(self.queries), "float32") for _ in range(2))

    def begin(self, sinks: list[Any] | None) -> None:
        """Start with nothing seen but the sink, which takes weight and gives nothing."""
        for g, mixed in enumerate(self.mixed):
            I.buffer_store(self.top, f32(_LOW) if sinks is None else sinks[g % self.width], [g])
            I.buffer_store(self.total, f32(0.0 if sinks is None else 1.0), [g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(mixed, f32(0.0), [d])

    def score(self, q: Any, keys: Any, base: Any, count: Any) -> None:
        """Multiply the queries with `count` keys from position `base`."""
        limit = max(1, self.isa.accumulators * self.isa.lanes // POSITIONS)
        # Few queries take several blocks at a time, to have enough independent sums.
        wide = min(4, max(1, limit // len(self.queries)))
        blocks = bind((count + (POSITIONS - 1)) // POSITIONS)
        with I.serial(0, blocks // wide) as b:
            self._score_blocks(q, keys, base, b * wide, wide)
        if wide > 1:
            with I.serial(0, blocks % wide) as b:
                self._score_blocks(q, keys, base, blocks // wide * wide + b, 1)

    def _score_blocks(self, q: Any, keys: Any, base: Any, first: Any, wide: int) -> None:
        isa, a, lanes = self.isa, self.a, self.isa.lanes
        blocks = -(-a.capacity // POSITIONS)
        span, size = wide * POSITIONS, a.pairs * POSITIONS
        acc = [local(span, "float32") for _ in self.queries]
        for head in acc:
            for v in range(0, span, lanes):
                store(head, v, splat(f32(0.0), lanes), lanes)
        block = bind((self.plane * blocks + base // POSITIONS + first) * size)
        with I.serial(0, a.pairs) as d:
            for v in range(0, span, lanes):
                at = block + (v // POSITIONS * size + v % POSITIONS) + d * POSITIONS
                words = bind(load(keys, at, lanes))
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
                    I.buffer_store(scores, value, [first * POSITIONS + at + v])

    def soften(self, base: Any, count: Any) -> None:
        """Turn scores into weights relative to the highest score so far, and shrink what came before to match."""
        isa, lanes = self.isa, self.isa.lanes
        steps = bind((count + (lanes - 1)) // lanes)
        for g, (scores, mixed) in enumerate(zip(self.scores, self.mixed, strict=True)):
            position = self.position + g // self.width
            peak, sums = local(lanes, "float32"), local(lanes, "float32")
            store(peak, 0, splat(f32(_LOW), lanes), lanes)
            store(sums, 0, splat(f32(0.0), lanes), lanes)
            with I.serial(0, steps) as s, I.vectorized(0, lanes) as v:
                score = tirx.Select(
                    self._seen(base + s * lanes + v, position), scores[s * lanes + v], f32(_LOW)
                )
                I.buffer_store(peak, tirx.max(peak[v], score), [v])
            highest = bind(tirx.max(isa.reduce("fmax", load(peak, 0, lanes)), self.top[g]))
            shrink = bind(maths.exp(self.top[g] - highest))
            with I.serial(0, steps) as s, I.vectorized(0, lanes) as v:
                weight = maths.exp(scores[s * lanes + v] - highest)
                weight = tirx.Select(self._seen(base + s * lanes + v, position), weight, f32(0.0))
                I.buffer_store(scores, weight, [s * lanes + v])
                I.buffer_store(sums, sums[v] + scores[s * lanes + v], [v])
            total = maths.fma(self.total[g], shrink, isa.reduce("fadd", load(sums, 0, lanes)))
            I.buffer_store(self.total, total, [g])
            I.buffer_store(self.top, highest, [g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(mixed, mixed[d] * shrink, [d])

    def _seen(self, slot: Any, position: Any) -> Any:
        if not self.a.window:
            return slot <= position
        return tirx.all(slot <= position, slot > position - self.a.window)

    def mix(self, values: Any, base: Any, count: Any) -> None:
        """Add `count` values from position `base`, in order, each times its weight."""
        a, lanes = self.a, self.isa.lanes
        while a.value_dim % lanes:
            lanes //= 2
        span = max(1, min(self.isa.accumulators // len(self.queries), a.value_dim // lanes))
        while (a.value_dim // lanes) % span:
            span -= 1
        kind = f"float32x{lanes}" if lanes > 1 else "float32"
        slots = -(-a.capacity // POSITIONS) * POSITIONS
        with I.serial(0, a.value_dim // (lanes * span)) as tile:
            acc = [local(span * lanes, "float32") for _ in self.queries]
            for head, mixed in zip(acc, self.mixed, strict=True):
                for j in range(span):
                    store(head, j * lanes, load(mixed, (tile * span + j) * lanes, lanes), lanes)
            with I.serial(0, count) as t:
                for j in range(span):
                    at = (self.plane * slots + base + t) * a.value_dim + (tile * span + j) * lanes
                    wide = tirx.Cast(kind.replace("float", "int"), load(values, at, lanes))
                    v = bind(_float(tirx.shift_left(wide, splat(i32(16), lanes)), lanes))
                    for head, weights in zip(acc, self.scores, strict=True):
                        weight = splat(weights[t], lanes)
                        new = intrinsic(kind, "llvm.fmuladd", v, weight, load(head, j * lanes, lanes))
                        store(head, j * lanes, new, lanes)
            for head, mixed in zip(acc, self.mixed, strict=True):
                for j in range(span):
                    store(mixed, (tile * span + j) * lanes, load(head, j * lanes, lanes), lanes)

    def finish(self, out: Any) -> None:
        """Divide by the total weight and store."""
        for g, (query, mixed) in enumerate(zip(self.queries, self.mixed, strict=True)):
            inverse = bind(f32(1.0) / self.total[g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(out, mixed[d] * inverse, [query * self.a.value_dim + d])


def _float(bits: Any, lanes: int) -> Any:
    return tirx.reinterpret(f"float32x{lanes}" if lanes > 1 else "float32", bits)

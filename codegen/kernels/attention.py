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
    group = a.heads // a.kv_heads
    limit = max(1, isa.accumulators * isa.lanes // POSITIONS)
    tiles = -(-group // limit)
    width = -(-group // tiles)
    with phase(), parallel(a.rows * a.kv_heads * tiles) as u:
        row, head = u // (a.kv_heads * tiles), (u // tiles) % a.kv_heads
        first = head * group + (u % tiles) * width
        if group % width:
            # The last tile overlaps the one before: both compute the same bits for a shared head.
            first = tirx.min(first, (head + 1) * group - width)
        unit = _Unit(
            isa, a, width, bind(row * a.heads + first), bind(layer * a.kv_heads + head), bind(start + row)
        )
        unit.begin(None if sinks is None else [sinks(first + g) for g in range(width)])
        oldest = tirx.max(unit.position - (a.window - 1), i32(0)) if a.window else i32(0)
        begin = bind(oldest // CHUNK)
        with I.serial(0, unit.position // CHUNK + 1 - begin) as c:
            base = bind((begin + c) * CHUNK)
            count = bind(tirx.min(unit.position + 1 - base, i32(CHUNK)))
            unit.score(q, cache[0], base, count)
            unit.soften(base, count)
            unit.mix(cache[1], base, count)
        unit.finish(out)


class _Unit:
    """`width` query heads of one row that share a key head: `query` is the first, `plane` the layer's key head."""

    def __init__(self, isa: ISA, a: Attention, width: int, query: Any, plane: Any, position: Any) -> None:
        self.isa, self.a, self.width = isa, a, width
        self.query, self.plane, self.position = query, plane, position
        self.scores = [local(CHUNK, "float32") for _ in range(width)]
        self.mixed = [local(a.value_dim, "float32") for _ in range(width)]
        self.top, self.total = local(width, "float32"), local(width, "float32")

    def begin(self, sinks: list[Any] | None) -> None:
        """Start with nothing seen but the sink, which takes weight and gives nothing."""
        for g, mixed in enumerate(self.mixed):
            I.buffer_store(self.top, f32(_LOW) if sinks is None else sinks[g], [g])
            I.buffer_store(self.total, f32(0.0 if sinks is None else 1.0), [g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(mixed, f32(0.0), [d])

    def score(self, q: Any, keys: Any, base: Any, count: Any) -> None:
        """Multiply the queries with `count` keys from position `base`."""
        isa, a, lanes = self.isa, self.a, self.isa.lanes
        blocks = -(-a.capacity // POSITIONS)
        with I.serial(0, (count + (POSITIONS - 1)) // POSITIONS) as b:
            acc = [local(POSITIONS, "float32") for _ in range(self.width)]
            for head in acc:
                for v in range(0, POSITIONS, lanes):
                    store(head, v, splat(f32(0.0), lanes), lanes)
            block = bind((self.plane * blocks + base // POSITIONS + b) * (a.pairs * POSITIONS))
            with I.serial(0, a.pairs) as d:
                for v in range(0, POSITIONS, lanes):
                    words = bind(load(keys, block + d * POSITIONS + v, lanes))
                    low = bind(_float(tirx.shift_left(words, splat(i32(16), lanes)), lanes))
                    high = bind(_float(tirx.bitwise_and(words, splat(i32(-65536), lanes)), lanes))
                    for g, head in enumerate(acc):
                        at = (self.query + g) * (2 * a.pairs) + d * 2
                        even = isa.fma(low, splat(q[at], lanes), load(head, v, lanes))
                        store(head, v, isa.fma(high, splat(q[at + 1], lanes), even), lanes)
            for head, scores in zip(acc, self.scores, strict=True):
                with I.serial(0, POSITIONS // lanes) as s, I.vectorized(0, lanes) as v:
                    value = head[s * lanes + v] * f32(a.scale)
                    if a.softcap:
                        value = maths.tanh(value * f32(1 / a.softcap)) * f32(a.softcap)
                    I.buffer_store(scores, value, [b * POSITIONS + s * lanes + v])

    def soften(self, base: Any, count: Any) -> None:
        """Turn scores into weights relative to the highest score so far, and shrink what came before to match."""
        isa, lanes = self.isa, self.isa.lanes
        steps = bind((count + (lanes - 1)) // lanes)
        for g, (scores, mixed) in enumerate(zip(self.scores, self.mixed, strict=True)):
            peak, sums = local(lanes, "float32"), local(lanes, "float32")
            store(peak, 0, splat(f32(_LOW), lanes), lanes)
            store(sums, 0, splat(f32(0.0), lanes), lanes)
            with I.serial(0, steps) as s, I.vectorized(0, lanes) as v:
                score = tirx.Select(self._seen(base + s * lanes + v), scores[s * lanes + v], f32(_LOW))
                I.buffer_store(peak, tirx.max(peak[v], score), [v])
            highest = bind(tirx.max(isa.reduce("fmax", load(peak, 0, lanes)), self.top[g]))
            shrink = bind(maths.exp(self.top[g] - highest))
            with I.serial(0, steps) as s, I.vectorized(0, lanes) as v:
                weight = maths.exp(scores[s * lanes + v] - highest)
                weight = tirx.Select(self._seen(base + s * lanes + v), weight, f32(0.0))
                I.buffer_store(scores, weight, [s * lanes + v])
                I.buffer_store(sums, sums[v] + scores[s * lanes + v], [v])
            total = maths.fma(self.total[g], shrink, isa.reduce("fadd", load(sums, 0, lanes)))
            I.buffer_store(self.total, total, [g])
            I.buffer_store(self.top, highest, [g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(mixed, mixed[d] * shrink, [d])

    def _seen(self, slot: Any) -> Any:
        if not self.a.window:
            return slot <= self.position
        return tirx.all(slot <= self.position, slot > self.position - self.a.window)

    def mix(self, values: Any, base: Any, count: Any) -> None:
        """Add `count` values from position `base`, in order, each times its weight."""
        a, lanes = self.a, self.isa.lanes
        while a.value_dim % lanes:
            lanes //= 2
        span = max(1, min(-(-self.isa.accumulators // self.width), a.value_dim // lanes))
        while (a.value_dim // lanes) % span:
            span -= 1
        kind = f"float32x{lanes}" if lanes > 1 else "float32"
        slots = -(-a.capacity // POSITIONS) * POSITIONS
        with I.serial(0, a.value_dim // (lanes * span)) as tile:
            acc = [local(span * lanes, "float32") for _ in range(self.width)]
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
        for g, mixed in enumerate(self.mixed):
            inverse = bind(f32(1.0) / self.total[g])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(out, mixed[d] * inverse, [(self.query + g) * self.a.value_dim + d])


def _float(bits: Any, lanes: int) -> Any:
    return tirx.reinterpret(f"float32x{lanes}" if lanes > 1 else "float32", bits)

"""Queries that share a key head, attending chunk by chunk with a running softmax.

Chunks start at multiples of `CHUNK`, whatever the query, so a row's bits depend on its position alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specqd.codegen import maths
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.cache import Paged, Values
from specqd.codegen.kernels.rotation import rotate
from specqd.codegen.tir import I, bind, f32, i32, intrinsic, load, local, prefetch, splat, store, tirx
from specqd.manifest import BLOCK

__all__ = ["CHUNK", "Attention", "Queries"]

#: positions between two rescalings of the running softmax
CHUNK = 128
_LOW = -1e30


@dataclass(frozen=True)
class Attention:
    """Shapes and options of one attention: `heads` queries over `kv_heads`.

    `adjacent`: the rows are known to be consecutive positions of one sequence. `by_block`: positions of different
    blocks of the cache do not see the same in it. `key_signs`, `value_signs`: those by which keys (and so queries) and
    values are rotated, if they are.
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
    by_block: bool = False
    key_signs: tuple[int, ...] = ()
    value_signs: tuple[int, ...] = ()

    @property
    def pairs(self) -> int:
        """Channel pairs of a key."""
        return -(-self.key_dim // 2)


class Queries:
    """Queries that share a key head: `width` heads of each of some consecutive positions of one sequence.

    `query` is the first of them, `row` the row it belongs to; `plane` is the layer's key head. Positions that only
    later rows see are masked in the earlier ones, where they weigh exactly nothing. Of a cache with recent blocks, all
    rows are in one block.
    """

    def __init__(
        self, isa: ISA, a: Attention, shape: tuple[int, int], query: Any, cache: Paged, plane: Any, row: Any
    ) -> None:
        self.isa, self.a, self.cache, self.plane = isa, a, cache, plane
        self.rows, self.width = shape
        self.queries = [query + (r * a.heads + g) for r in range(self.rows) for g in range(self.width)]
        self.table, self.slot = cache.stand(plane, row)
        self.last = bind((self.slot + (self.rows - 1)) // BLOCK)
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
        most = min(4, max(1, limit // len(self.queries)))
        for cache, begin, end in self._parts(base, count):
            blocks, wide = end - begin, most if cache is self.cache else 1
            with I.serial(0, blocks // wide) as b:
                self._score_blocks(cache, q, base, begin + b * wide, wide)
            if wide > 1:
                with I.serial(0, blocks % wide) as b:
                    self._score_blocks(cache, q, base, begin + blocks // wide * wide + b, 1)

    def _parts(self, base: Any, count: Any) -> list[tuple[Paged, Any, Any]]:
        """Return where the blocks lie that hold `count` positions from `base`, and which, counted from there."""
        blocks, recent = bind((count + (BLOCK - 1)) // BLOCK), self.cache.recent
        if recent is None:
            return [(self.cache, i32(0), blocks)]
        older = self.slot // BLOCK - recent.window - base // BLOCK
        border = bind(tirx.max(tirx.min(older, blocks), i32(0)))
        return [(self.cache, i32(0), border), (recent, border, blocks)]

    def _score_blocks(self, cache: Paged, q: Any, base: Any, first: Any, wide: int) -> None:
        a, lanes, form = self.a, self.isa.lanes, cache.key_form
        index = bind(base // BLOCK + first)
        blocks = [bind(cache.block(self.plane, self.table, index + b) * form.elements) for b in range(wide)]
        later = [self._later(cache, index + b) * form.elements for b in range(wide)]
        sums = self._multiply(cache, q, blocks, later, 0)
        for group in range(1, -(-a.key_dim // form.group)):
            for total, more in zip(sums, self._multiply(cache, q, blocks, later, group), strict=True):
                for v in range(0, wide * BLOCK, lanes):
                    store(total, v, load(total, v, lanes) + load(more, v, lanes), lanes)
        for head, scores in zip(sums, self.scores, strict=True):
            # Indices are constants here, or LLVM would keep the sums in memory.
            for at in range(0, wide * BLOCK, lanes):
                with I.vectorized(0, lanes) as v:
                    value = head[at + v] * f32(a.scale)
                    if a.softcap:
                        value = maths.tanh(value * f32(1 / a.softcap)) * f32(a.softcap)
                    I.buffer_store(scores, value, [first * BLOCK + at + v])

    def _later(self, cache: Paged, index: Any) -> Any:
        """Where the block lies that is read a chunk after block `index`, or the last one."""
        return bind(cache.block(self.plane, self.table, tirx.min(index + CHUNK // BLOCK, self.last)))

    def _multiply(self, cache: Paged, q: Any, blocks: list[Any], later: list[Any], group: int) -> list[Any]:
        """Multiply the queries with one group of channels of whole blocks of keys, a local buffer each."""
        isa, lanes, form, keys = self.isa, self.isa.lanes, cache.key_form, cache.keys
        places = [(at, blocks[at // BLOCK], at % BLOCK) for at in range(0, len(blocks) * BLOCK, lanes)]
        sums = [local(len(blocks) * BLOCK, "float32") for _ in self.queries]
        for head in sums:
            for at, _, _ in places:
                store(head, at, splat(f32(0.0), lanes), lanes)
        first = group * form.group // 2
        with I.serial(first, min(first + -(-form.group // 2), form.pairs)) as d:
            for at, block, slot in places:
                low, high = form.pair(keys, block, d, slot)
                for query, head in zip(self.queries, sums, strict=True):
                    channel = query * (2 * form.pairs) + d * 2
                    even = isa.fma(low, splat(q[channel], lanes), load(head, at, lanes))
                    store(head, at, isa.fma(high, splat(q[channel + 1], lanes), even), lanes)
            for block in later:
                prefetch(keys, block + d * (form.elements // form.pairs))
        for at, block, slot in places:
            scales = form.scales(keys, block, group, slot)
            for head in sums if scales is not None else ():
                store(head, at, load(head, at, lanes) * scales, lanes)
        return sums

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
                score = tirx.Select(self.seen(base + s * lanes + v, of_row), scores[s * lanes + v], f32(_LOW))
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
        for cache, begin, end in self._parts(base, count):
            self._mix_blocks(cache, base, begin, end, count)

    def _mix_blocks(self, cache: Paged, base: Any, begin: Any, end: Any, count: Any) -> None:
        a, form = self.a, cache.value_form
        lanes, span = self._value_tile(form)
        kind = f"float32x{lanes}" if lanes > 1 else "float32"
        with I.serial(0, a.value_dim // (lanes * span)) as tile:
            acc = [local(span * lanes, "float32") for _ in self.queries]
            for head, mixed in zip(acc, self.mixed, strict=True):
                for j in range(span):
                    store(head, j * lanes, load(mixed, (tile * span + j) * lanes, lanes), lanes)
            with I.serial(0, end - begin) as at:
                b = bind(begin + at)
                block = bind(cache.block(self.plane, self.table, base // BLOCK + b) * form.elements)
                later = self._later(cache, base // BLOCK + b) * form.elements
                later += tile * (lanes * span) // form.packed
                weights = self._weights(cache, block, b, tile * (lanes * span), lanes * span)
                with I.serial(0, tirx.min(count - b * BLOCK, i32(BLOCK))) as t:
                    for line in range(0, lanes * span, form.line):
                        first = later + t * (form.elements // BLOCK)
                        prefetch(cache.values, first + line // form.packed)
                    for j in range(span):
                        v = form.vector(cache.values, block, t, (tile * span + j) * lanes, lanes)
                        of_group = weights[j * lanes // form.group]
                        for head, weight in zip(acc, of_group, strict=True):
                            old = load(head, j * lanes, lanes)
                            new = intrinsic(kind, "llvm.fmuladd", v, splat(weight(t), lanes), old)
                            store(head, j * lanes, new, lanes)
            for head, mixed in zip(acc, self.mixed, strict=True):
                for j in range(span):
                    store(mixed, (tile * span + j) * lanes, load(head, j * lanes, lanes), lanes)

    def _value_tile(self, form: Values) -> tuple[int, int]:
        """Lanes of a vector of value channels, and vectors that are mixed at once: of whole groups, or within one."""
        a, lanes, group = self.a, self.isa.lanes, form.group
        while a.value_dim % lanes or group % lanes:
            lanes //= 2
        span = max(1, min(self.isa.accumulators // len(self.queries), a.value_dim // lanes))
        while a.value_dim // lanes % span or (span * lanes % group and group % (span * lanes)):
            span -= 1
        return lanes, span

    def _weights(
        self, cache: Paged, block: Any, b: Any, channel: Any, size: int
    ) -> list[list[Callable[[Any], Any]]]:
        """For each group of `size` channels from `channel`, and each query: what a value of the block weighs."""
        form, lanes = cache.value_form, self.isa.lanes
        groups = [channel // form.group + i for i in range(max(1, size // form.group))]
        scales = [
            [form.scales(cache.values, block, group, slot) for slot in range(0, BLOCK, lanes)]
            for group in groups
        ]
        return [[self._scaled(weights, b, of_group) for weights in self.scores] for of_group in scales]

    def _scaled(self, weights: Any, b: Any, scales: list[Any]) -> Callable[[Any], Any]:
        if scales[0] is None:
            return lambda t: weights[b * BLOCK + t]
        lanes, products = self.isa.lanes, local(BLOCK, "float32")
        for i, scale in enumerate(scales):
            store(products, i * lanes, load(weights, b * BLOCK + i * lanes, lanes) * scale, lanes)
        return lambda t: products[t]

    def finish(self, out: Any, totals: Any) -> None:
        """Divide by the total weight and store."""
        for g, (query, mixed) in enumerate(zip(self.queries, self.mixed, strict=True)):
            inverse = bind(f32(1.0) / self.total[g])
            if totals is not None:
                I.buffer_store(totals, self.top[g], [query * 2])
                I.buffer_store(totals, inverse, [query * 2 + 1])
            with I.serial(0, self.a.value_dim) as d:
                I.buffer_store(out, mixed[d] * inverse, [query * self.a.value_dim + d])
        if self.a.value_signs:
            self._rotate_back(out)

    def _rotate_back(self, out: Any) -> None:
        size, line = self.a.value_dim, local(self.a.value_dim, "float32")
        with I.serial(0, self.rows) as row, I.serial(0, self.width) as head:
            first = bind((self.queries[0] + row * self.a.heads + head) * size)
            with I.serial(0, size) as d:
                I.buffer_store(line, out[first + d], [d])
            rotate(line, size, self.a.value_signs, back=True)
            with I.serial(0, size) as d:
                I.buffer_store(out, line[d], [first + d])

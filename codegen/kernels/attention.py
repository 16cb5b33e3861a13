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
        position = bind(start + row)
        first = head * group + (u % tiles) * width
        if group % width:
            first = tirx.min(first, (head + 1) * group - width)
        first = bind(first)
        _unit(isa, a, width, q, cache, layer, head, row, first, position, sinks, out)


def _unit(
    isa: ISA,
    a: Attention,
    width: int,
    q: Any,
    cache: Any,
    layer: Any,
    head: Any,
    row: Any,
    first: Any,
    position: Any,
    sinks: Any,
    out: Any,
) -> None:
    scores = local(width * CHUNK, "float32")
    top, total = local(width, "float32"), local(width, "float32")
    mixed = local(width * a.value_dim, "float32")
    for g in range(width):
        I.buffer_store(top, f32(_LOW) if sinks is None else sinks(first + g), [g])
        I.buffer_store(total, f32(0.0 if sinks is None else 1.0), [g])
    with I.serial(0, width * a.value_dim) as i:
        I.buffer_store(mixed, f32(0.0), [i])
    oldest = tirx.max(position - (a.window - 1), i32(0)) if a.window else i32(0)
    begin = bind(oldest // CHUNK)
    plane = bind(layer * a.kv_heads + head)
    with I.serial(0, position // CHUNK + 1 - begin) as c:
        base = bind((begin + c) * CHUNK)
        count = bind(tirx.min(position + 1 - base, i32(CHUNK)))
        _scores(isa, a, width, q, cache[0], plane, row * a.heads + first, base, count, scores)
        _softmax(isa, a, width, scores, top, total, mixed, base, count, position)
        _mix(isa, a, width, cache[1], plane, base, count, scores, mixed)
    for g in range(width):
        inverse = bind(f32(1.0) / total[g])
        with I.serial(0, a.value_dim) as d:
            I.buffer_store(
                out, mixed[g * a.value_dim + d] * inverse, [((row * a.heads + first + g) * a.value_dim) + d]
            )


def _scores(
    isa: ISA,
    a: Attention,
    width: int,
    q: Any,
    keys: Any,
    plane: Any,
    query: Any,
    base: Any,
    count: Any,
    out: Any,
) -> None:
    lanes, vectors = isa.lanes, POSITIONS // isa.lanes
    with I.serial(0, (count + (POSITIONS - 1)) // POSITIONS) as b:
        acc = local(width * POSITIONS, "float32")
        for i in range(width * vectors):
            store(acc, i * lanes, splat(f32(0.0), lanes), lanes)
        block = bind((plane * (-(-a.capacity // POSITIONS)) + base // POSITIONS + b) * (a.pairs * POSITIONS))
        with I.serial(0, a.pairs) as d:
            for v in range(vectors):
                words = load(keys, block + d * POSITIONS + v * lanes, lanes)
                low = bind(
                    tirx.reinterpret(f"float32x{lanes}", tirx.shift_left(words, splat(i32(16), lanes)))
                )
                mask = splat(i32(-65536), lanes)
                high = bind(tirx.reinterpret(f"float32x{lanes}", tirx.bitwise_and(words, mask)))
                for g in range(width):
                    i = g * POSITIONS + v * lanes
                    at = (query + g) * (2 * a.pairs) + d * 2
                    even = isa.fma(low, splat(q[at], lanes), load(acc, i, lanes))
                    store(acc, i, isa.fma(high, splat(q[at + 1], lanes), even), lanes)
        for g in range(width):
            for v in range(vectors):
                score = load(acc, g * POSITIONS + v * lanes, lanes) * splat(f32(a.scale), lanes)
                if a.softcap:
                    score = maths_vector(
                        maths.tanh, score * splat(f32(1 / a.softcap), lanes), a.softcap, lanes
                    )
                store(out, g * CHUNK + b * POSITIONS + v * lanes, score, lanes)


def maths_vector(function: Any, x: Any, scale: float, lanes: int) -> Any:
    """Apply a scalar function of `maths` lane by lane through a small vectorised loop, times `scale`."""
    source, result = local(lanes, "float32"), local(lanes, "float32")
    store(source, 0, x, lanes)
    with I.vectorized(0, lanes) as v:
        I.buffer_store(result, function(source[v]) * f32(scale), [v])
    return load(result, 0, lanes)


def _softmax(
    isa: ISA,
    a: Attention,
    width: int,
    scores: Any,
    top: Any,
    total: Any,
    mixed: Any,
    base: Any,
    count: Any,
    position: Any,
) -> None:
    lanes = isa.lanes
    steps = bind((count + (lanes - 1)) // lanes)

    def seen(t: Any) -> Any:
        ok = t <= position
        return tirx.all(ok, t > position - a.window) if a.window else ok

    for g in range(width):
        peak = local(lanes, "float32")
        store(peak, 0, splat(f32(_LOW), lanes), lanes)
        with I.serial(0, steps) as s, I.vectorized(0, lanes) as v:
            score = scores[g * CHUNK + s * lanes + v]
            score = tirx.Select(seen(base + s * lanes + v), score, f32(_LOW))
            I.buffer_store(peak, tirx.max(peak[v], score), [v])
        highest = bind(tirx.max(isa.reduce("fmax", load(peak, 0, lanes)), top[g]))
        shrink = bind(maths.exp(top[g] - highest))
        sums = local(lanes, "float32")
        store(sums, 0, splat(f32(0.0), lanes), lanes)
        with I.serial(0, steps) as s:
            with I.vectorized(0, lanes) as v:
                at = g * CHUNK + s * lanes + v
                weight = maths.exp(scores[at] - highest)
                I.buffer_store(scores, tirx.Select(seen(base + s * lanes + v), weight, f32(0.0)), [at])
            store(sums, 0, load(sums, 0, lanes) + load(scores, g * CHUNK + s * lanes, lanes), lanes)
        I.buffer_store(total, maths.fma(total[g], shrink, isa.reduce("fadd", load(sums, 0, lanes))), [g])
        I.buffer_store(top, highest, [g])
        with I.serial(0, a.value_dim) as d:
            I.buffer_store(mixed, mixed[g * a.value_dim + d] * shrink, [g * a.value_dim + d])


def _mix(
    isa: ISA,
    a: Attention,
    width: int,
    values: Any,
    plane: Any,
    base: Any,
    count: Any,
    weights: Any,
    mixed: Any,
) -> None:
    lanes = isa.lanes
    while a.value_dim % lanes:
        lanes //= 2
    span = max(1, min(isa.accumulators // width, a.value_dim // lanes))
    while (a.value_dim // lanes) % span:
        span -= 1
    dtype = f"x{lanes}" if lanes > 1 else ""
    rows = -(-a.capacity // POSITIONS) * POSITIONS
    with I.serial(0, a.value_dim // (lanes * span)) as tile:
        acc = local(width * span * lanes, "float32")
        for g in range(width):
            for j in range(span):
                old = load(mixed, g * a.value_dim + (tile * span + j) * lanes, lanes)
                store(acc, (g * span + j) * lanes, old, lanes)
        with I.serial(0, count) as t:
            for j in range(span):
                at = (plane * rows + base + t) * a.value_dim + (tile * span + j) * lanes
                wide = tirx.Cast(f"int32{dtype}", load(values, at, lanes))
                v = bind(tirx.reinterpret(f"float32{dtype}", tirx.shift_left(wide, splat(i32(16), lanes))))
                for g in range(width):
                    i = (g * span + j) * lanes
                    weight = splat(weights[g * CHUNK + t], lanes)
                    store(
                        acc,
                        i,
                        intrinsic(f"float32{dtype}", "llvm.fmuladd", v, weight, load(acc, i, lanes)),
                        lanes,
                    )
        for g in range(width):
            for j in range(span):
                new = load(acc, (g * span + j) * lanes, lanes)
                store(mixed, g * a.value_dim + (tile * span + j) * lanes, new, lanes)

"""Greedy choice, and how sure it is: the first index of the largest logit of each row, and two sums over all."""

from __future__ import annotations

from typing import Any

from specqd.codegen import maths
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, f32, i32, load, local, parallel, splat, store, tirx

__all__ = ["argmax"]

_CHUNKS = 16
#: logits this far below the largest weigh nothing; it keeps 0 times infinity out of the sums
_FAR = 100.0


def argmax(
    isa: ISA, rows: int, n: int, logits: Any, out: Any, sums: Any, scratch: tuple[Any, Any, Any], phase: Any
) -> None:
    """Emit two phases: over each of 16 chunks, then over a row.

    `out int32 [rows]` is the choice. With d a logit less the largest of its row, `sums float32 [rows, 2]` are
    those of e^d (so 1 / sum is the probability of the choice) and of -d e^d (which gives the entropy).
    `scratch` is float32 `[rows, 16]`, int32 `[rows, 16]` and float32 `[rows, 32]`.
    """
    lanes = isa.lanes
    chunk = -(-n // (_CHUNKS * lanes)) * lanes
    best, where, parts = scratch
    with phase(), parallel(rows * _CHUNKS) as u:
        row, first = u // _CHUNKS, bind(tirx.min((u % _CHUNKS) * chunk, i32(n)))
        last = bind(tirx.min(first + chunk, i32(n)))
        _chunk(lanes, logits, row * n, first, last, best, where, u)
        _weigh(isa, logits, row * n, first, last, best[u], parts, u * 2)
    with phase(), parallel(rows) as m:
        top, at = local(1, "float32"), local(1, "int32")
        I.buffer_store(top, f32(-3.4e38), [0])
        I.buffer_store(at, i32(0), [0])
        with I.serial(0, _CHUNKS) as c, I.If(best[m * _CHUNKS + c] > top[0]), I.Then():
            I.buffer_store(top, best[m * _CHUNKS + c], [0])
            I.buffer_store(at, where[m * _CHUNKS + c], [0])
        I.buffer_store(out, at[0], [m])
        _join(m, top[0], best, parts, sums)


def _chunk(lanes: int, logits: Any, base: Any, first: Any, last: Any, best: Any, where: Any, u: Any) -> None:
    tops, ats = local(lanes, "float32"), local(lanes, "int32")
    store(tops, 0, splat(f32(-3.4e38), lanes), lanes)
    store(ats, 0, splat(i32(0), lanes), lanes)
    whole = bind((last - first) // lanes)
    with I.serial(0, whole) as s:
        at = bind(first + s * lanes)
        v = bind(load(logits, base + at, lanes))
        better = v > load(tops, 0, lanes)
        store(ats, 0, tirx.Select(better, tirx.Ramp(at, 1, lanes), load(ats, 0, lanes)), lanes)
        store(tops, 0, tirx.max(v, load(tops, 0, lanes)), lanes)
    I.buffer_store(best, f32(-3.4e38), [u])
    I.buffer_store(where, i32(0), [u])

    def offer(value: Any, index: Any) -> None:
        higher = value > best[u]
        tie = tirx.all(value == best[u], index < where[u])
        with I.If(tirx.any(higher, tie)), I.Then():
            I.buffer_store(best, value, [u])
            I.buffer_store(where, index, [u])

    with I.serial(0, lanes) as i:
        offer(tops[i], ats[i])
    with I.serial(0, last - first - whole * lanes) as i:
        at = bind(first + whole * lanes + i)
        offer(logits[base + at], at)


def _weigh(isa: ISA, logits: Any, base: Any, first: Any, last: Any, top: Any, parts: Any, at: Any) -> None:
    """Store the sums of e^d and -d e^d of one chunk, d relative to its own largest logit."""
    lanes = isa.lanes
    weights, spreads = local(lanes, "float32"), local(lanes, "float32")
    for buffer in (weights, spreads):
        store(buffer, 0, splat(f32(0.0), lanes), lanes)
    top, whole = bind(top), bind((last - first) // lanes)
    with I.serial(0, whole) as s, I.vectorized(0, lanes) as v:
        less = top - logits[base + first + s * lanes + v]
        weight = maths.exp(less * f32(-1.0))
        I.buffer_store(weights, weights[v] + weight, [v])
        I.buffer_store(spreads, maths.fma(tirx.min(less, f32(_FAR)), weight, spreads[v]), [v])
    I.buffer_store(parts, isa.reduce("fadd", load(weights, 0, lanes)), [at])
    I.buffer_store(parts, isa.reduce("fadd", load(spreads, 0, lanes)), [at + 1])
    with I.serial(0, last - first - whole * lanes) as i:
        less = bind(top - logits[base + first + whole * lanes + i])
        weight = bind(maths.exp(less * f32(-1.0)))
        I.buffer_store(parts, parts[at] + weight, [at])
        I.buffer_store(parts, parts[at + 1] + tirx.min(less, f32(_FAR)) * weight, [at + 1])


def _join(row: Any, top: Any, best: Any, parts: Any, sums: Any) -> None:
    """Add the chunks' sums up, each moved to the largest logit of the row."""
    for i in range(2):
        I.buffer_store(sums, f32(0.0), [row * 2 + i])
    with I.serial(0, _CHUNKS) as c:
        at = bind(row * _CHUNKS + c)
        less = bind(tirx.min(top - best[at], f32(_FAR)))
        factor = bind(maths.exp(less * f32(-1.0)))
        I.buffer_store(sums, sums[row * 2] + factor * parts[at * 2], [row * 2])
        moved = parts[at * 2 + 1] + less * parts[at * 2]
        I.buffer_store(sums, sums[row * 2 + 1] + factor * moved, [row * 2 + 1])

"""Greedy choice: the first index of the largest logit of each row."""

from __future__ import annotations

from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, f32, i32, load, local, parallel, splat, store, tirx

__all__ = ["argmax"]

_CHUNKS = 16


def argmax(isa: ISA, rows: int, n: int, logits: Any, out: Any, best: Any, where: Any, phase: Any) -> None:
    """Emit two phases: the best of each of 16 chunks, then of a row. `best`, `where` are scratch `[rows, 16]`."""
    lanes = isa.lanes
    chunk = -(-n // (_CHUNKS * lanes)) * lanes
    with phase(), parallel(rows * _CHUNKS) as u:
        row, first = u // _CHUNKS, bind(tirx.min((u % _CHUNKS) * chunk, i32(n)))
        last = bind(tirx.min(first + chunk, i32(n)))
        _chunk(lanes, logits, row * n, first, last, best, where, u)
    with phase(), parallel(rows) as m:
        top, at = local(1, "float32"), local(1, "int32")
        I.buffer_store(top, f32(-3.4e38), [0])
        I.buffer_store(at, i32(0), [0])
        with I.serial(0, _CHUNKS) as c, I.If(best[m * _CHUNKS + c] > top[0]), I.Then():
            I.buffer_store(top, best[m * _CHUNKS + c], [0])
            I.buffer_store(at, where[m * _CHUNKS + c], [0])
        I.buffer_store(out, at[0], [m])


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

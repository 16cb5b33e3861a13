"""How much attention each slot of a cache receives, computed beside attention: no row of weights is ever whole."""

from __future__ import annotations

from typing import Any

from specqd.codegen import maths
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.attention import query_tile
from specqd.codegen.kernels.cache import Paged
from specqd.codegen.kernels.queries import CHUNK, Attention, Queries
from specqd.codegen.tir import I, bind, f32, i32, local, parallel, tirx

__all__ = ["received"]


def received(
    isa: ISA,
    a: Attention,
    q: Any,
    cache: Paged,
    totals: Any,
    out: Any,
    capacity: int,
    phase: Any,
) -> None:
    """Emit one phase: what each slot up to the last row's gets, to `out` float32 `[planes, capacity]`.

    That is the mean over the rows, consecutive positions of one sequence, and the queries of a key head. `q` and
    `totals` are as `attention` takes and leaves them.
    """
    width, tiles, together = query_tile(isa, a)
    together = together if a.rows % together == 0 else 1
    group = a.heads // a.kv_heads
    chunks = -(-capacity // CHUNK)
    with phase(), parallel(a.kv_heads * chunks) as u:
        # Neighbouring tasks go to one thread, and only early chunks are there at first: deal them out by turns.
        turn, head = bind(u // a.kv_heads), bind(u % a.kv_heads)
        half = -(-chunks // 2)
        chunk = bind(tirx.Select(turn < half, turn * 2, (turn - half) * 2 + 1))
        plane = bind(cache.layer * a.kv_heads + head)
        _, newest = cache.stand(plane, i32(a.rows - 1))
        base = bind(chunk * CHUNK)
        with I.If(base <= newest), I.Then():
            count = bind(tirx.min(newest + 1 - base, i32(CHUNK)))
            sums = local(CHUNK, "float32")
            with I.serial(0, CHUNK) as i:
                I.buffer_store(sums, f32(0.0), [i])
            with I.serial(0, a.rows // together) as group_of_rows, I.serial(0, tiles) as tile:
                row = bind(group_of_rows * together)
                # The last tile may overlap the one before: its first queries count as nothing then.
                first = bind(tirx.min(tile * width, i32(group - width)))
                queries = bind(row * a.heads + head * group + first)
                unit = Queries(isa, a, (together, width), queries, cache, plane, row)
                unit.score(q, base, count)
                for g, (query, scores) in enumerate(zip(unit.queries, unit.scores, strict=True)):
                    of_row, place = g // width, first + g % width
                    share = tirx.Select(place >= tile * width, f32(1 / (group * a.rows)), f32(0.0))
                    share = bind(share * totals[query * 2 + 1])
                    with I.serial(0, CHUNK // isa.lanes) as s, I.vectorized(0, isa.lanes) as v:
                        at = s * isa.lanes + v
                        weight = maths.exp(scores[at] - totals[query * 2])
                        weight = tirx.Select(unit.seen(base + at, unit.slot + of_row), weight, f32(0.0))
                        I.buffer_store(sums, maths.fma(weight, share, sums[at]), [at])
            with I.serial(0, count) as i:
                I.buffer_store(out, sums[i], [(plane + cache.first) * capacity + base + i])

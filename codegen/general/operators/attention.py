"""Attention: chunk by chunk of keys with a running softmax (FlashAttention), so that the scores are never whole."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

import specqd.ops  # noqa: F401  (registers the operator)
from specqd.codegen.general.functions import unary
from specqd.codegen.general.kernel import Kernel
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.matrix import blocks, limited, packed
from specqd.codegen.general.values import Value, i64, position
from specqd.codegen.tir import I, bind, f32, load, local, splat, store, tirx

__all__ = ["RULES"]

#: vectors of keys between two rescalings of what was mixed so far
CHUNK = 8
#: what no score is below, -inf aside: masks made of float32's least number still compare as torch compares them
_LEAST = float(torch.finfo(torch.float32).min)

_exp = unary("exp", "float32")[0]


@dataclass(frozen=True)
class _Shape:
    """Sizes of one attention, and how many rows and lanes a block of scores in registers has."""

    batch: Any
    heads: Any
    queries: Any
    keys: Any
    dim: int
    channels: int
    rows: int
    width: int
    scale: float
    causal: bool


def _attention(
    lowering: Lowering,
    node: fx.Node,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    scale: float,
    causal: bool,
) -> Value:
    """Lower specqd::attention; each task mixes the values for some rows of queries of one head."""
    isa = lowering.isa
    batch, heads, queries, dim = q.shape
    rows, width = 8 if isa.registers > 16 else 6, 2 * isa.lanes
    rows = max(1, min(rows, queries)) if isinstance(queries, int) else rows
    shape = _Shape(batch, heads, queries, k.shape[2], dim, v.shape[3], rows, width, scale, causal)
    turned = k.view(
        (shape.batch * heads, shape.dim, shape.keys),
        lambda index: k.at(
            [tirx.floordiv(index[0], i64(heads)), tirx.floormod(index[0], i64(heads)), index[2], index[1]]
        ),
    )
    keys = packed(lowering, turned, width)
    q, v, seen = lowering.ready(q), lowering.ready(v), None if mask is None else lowering.ready(mask)
    out = (*q.shape[:3], shape.channels)
    flops = 2 * lowering.work(*q.shape[:3], shape.keys, shape.dim + shape.channels)

    def emit(kernel: Kernel, result: Any) -> None:
        if 0 in out:
            I.evaluate(i64(0))
            return
        grid = (shape.batch, shape.heads, blocks(shape.queries, rows))
        with kernel.tasks(grid[0] * grid[1] * grid[2], flops // 4) as task:
            one, head, block = position(task, grid)
            place = bind(i64(one)), bind(i64(head)), bind(block * rows)
            _Rows(kernel, shape, place, keys, q, v, seen).run(result)

    return lowering.launch("attention", [(out, "float32")], emit, flops)[0]


class _Rows:
    """Some neighbouring rows of queries of a head, which share each key and value that is loaded."""

    def __init__(
        self,
        kernel: Kernel,
        shape: _Shape,
        place: tuple[Any, Any, Any],
        keys: Value,
        q: Value,
        v: Value,
        mask: Value | None,
    ) -> None:
        self.kernel, self.shape, self.keys, self.q, self.v, self.mask = kernel, shape, keys, q, v, mask
        self.one, self.head, self.top = place
        # Rows beyond the last one compute what it does, and are not written.
        self.at = [bind(limited(self.top + r, shape.queries)) for r in range(shape.rows)]
        chunk, rows = CHUNK * kernel.isa.lanes, shape.rows
        self.scores = [local(chunk, "float32") for _ in range(rows)]
        self.mixed = [local(shape.channels, "float32") for _ in range(rows)]
        self.highest, self.total = (local(rows, "float32") for _ in range(2))

    def run(self, result: Any) -> None:
        """Go through the keys, then write what their values mix to."""
        shape, size = self.shape, CHUNK * self.kernel.isa.lanes
        for r in range(shape.rows):
            I.buffer_store(self.highest, f32(_LEAST), [r])
            I.buffer_store(self.total, f32(0.0), [r])
            self._change(r, lambda _: f32(0.0))
        end: Any = i64(shape.keys)
        if shape.causal:
            end = bind(tirx.min(end, self.top + shape.rows))
        with self.kernel.serial(tirx.floordiv(end + (size - 1), i64(size))) as chunk:
            base = bind(chunk * size)
            count = bind(tirx.min(i64(size), end - base))
            wide = bind(tirx.floordiv(count + (shape.width - 1), i64(shape.width)))
            self._score(base, wide)
            self._soften(wide * (shape.width // self.kernel.isa.lanes))
            self._mix(base, count)
        for r in range(shape.rows):
            with I.If(self.top + r < i64(shape.queries)), I.Then():
                self._write(result, r)

    def _score(self, base: Any, count: Any) -> None:
        """Multiply the queries with `count` blocks of keys from position `base`."""
        shape, lanes = self.shape, self.kernel.isa.lanes
        with I.serial(0, count) as block:
            # One below a kilobyte each, or they would not lie in registers.
            sums = [local(shape.width, "float32") for _ in self.at]
            for r, at in self._vectors():
                store(sums[r], at, splat(f32(0.0), lanes), lanes)
            head = self.one * i64(shape.heads) + self.head
            first = bind(tirx.floordiv(base, i64(shape.width)) + block)
            with self.kernel.serial(shape.dim) as d:
                queries = [bind(self.q.at([self.one, self.head, row, d])) for row in self.at]
                for at in range(0, shape.width, lanes):
                    with self.kernel.vector(lanes) as lane:
                        key = bind(self.keys.at([head, first, d, lane + at]))
                        for r, query in enumerate(queries):
                            I.buffer_store(sums[r], sums[r][lane + at] + query * key, [lane + at])
            for r, at in self._vectors():
                with self.kernel.vector(lanes) as lane:
                    place = block * shape.width + (lane + at)
                    I.buffer_store(self.scores[r], self._seen(r, base + place, sums[r][lane + at]), [place])
                    # A step of its own: in one expression TVM would drop the limit where a mask is read.
                    there = tirx.Select(base + place < i64(shape.keys), self.scores[r][place], f32(-math.inf))
                    I.buffer_store(self.scores[r], there, [place])

    def _vectors(self) -> Iterator[tuple[int, int]]:
        lanes = self.kernel.isa.lanes
        return ((r, at) for r in range(self.shape.rows) for at in range(0, self.shape.width, lanes))

    def _seen(self, row: int, key: Any, score: Any) -> Any:
        """Scale and mask the score of a key that there is; what a row does not see is -inf, whose weight is zero."""
        shape, score = self.shape, score * f32(self.shape.scale)
        inside = tirx.const(True, "bool")
        if self.mask is not None:
            sizes = self.mask.shape
            index = [self.one, self.head, self.at[row], tirx.min(key, i64(shape.keys) - 1)][4 - len(sizes) :]
            zeroed = [
                i64(0) if isinstance(n, int) and n == 1 else i for i, n in zip(index, sizes, strict=True)
            ]
            met = self.mask.at(zeroed)
            if self.mask.dtype == "bool":
                inside = tirx.all(inside, met)
            else:
                score = score + met
        if shape.causal:
            inside = tirx.all(inside, key <= self.at[row])
        return tirx.Select(inside, score, f32(-math.inf))

    def _soften(self, count: Any) -> None:
        """Turn `count` vectors of scores into weights relative to the highest so far, and shrink what came before."""
        isa, lanes = self.kernel.isa, self.kernel.isa.lanes
        for r, scores in enumerate(self.scores):
            peak, sums = local(lanes, "float32"), local(lanes, "float32")
            store(peak, 0, splat(f32(_LEAST), lanes), lanes)
            store(sums, 0, splat(f32(0.0), lanes), lanes)
            with I.serial(0, count) as step, self.kernel.vector(lanes) as lane:
                I.buffer_store(peak, tirx.max(peak[lane], scores[step * lanes + lane]), [lane])
            highest = bind(tirx.max(isa.reduce("fmax", load(peak, 0, lanes)), self.highest[r]))
            shrink = bind(_exp(self.highest[r] - highest))
            with I.serial(0, count) as step, self.kernel.vector(lanes) as lane:
                weight = bind(_exp(scores[step * lanes + lane] - highest))
                I.buffer_store(scores, weight, [step * lanes + lane])
                I.buffer_store(sums, sums[lane] + weight, [lane])
            total = self.total[r] * shrink + isa.reduce("fadd", load(sums, 0, lanes))
            I.buffer_store(self.total, total, [r])
            I.buffer_store(self.highest, highest, [r])
            self._change(r, partial(operator.mul, shrink))

    def _mix(self, base: Any, count: Any) -> None:
        """Add `count` values from position `base`, in order, each times its weight."""
        for begin, parts in self._channels():
            lanes, rows = parts[0], range(self.shape.rows)
            sums = [[local(lanes, "float32") for _ in parts] for _ in rows]
            for r in rows:
                for i in range(len(parts)):
                    whole = load(self.mixed[r], begin + i * lanes, lanes)
                    store(sums[r][i], 0, whole, lanes)
            with I.serial(0, count) as step:
                weights = [bind(self.scores[r][step]) for r in rows]
                for i in range(len(parts)):
                    with self.kernel.vector(lanes) as lane:
                        value = bind(
                            self.v.at([self.one, self.head, base + step, lane + (begin + i * lanes)])
                        )
                        for r in rows:
                            I.buffer_store(sums[r][i], sums[r][i][lane] + weights[r] * value, [lane])
            for r in rows:
                for i in range(len(parts)):
                    store(self.mixed[r], begin + i * lanes, load(sums[r][i], 0, lanes), lanes)

    def _write(self, result: Any, r: int) -> None:
        shape = self.shape
        row = ((self.one * i64(shape.heads) + self.head) * i64(shape.queries) + self.top + r) * shape.channels
        total = bind(self.total[r])
        # A row that sees nothing gives zeros, as torch's own kernels do.
        factor = bind(tirx.Select(tirx.EQ(total, f32(0.0)), f32(0.0), f32(1.0) / total))
        self._each_channel(lambda at: self.kernel.store(result, row + at, self.mixed[r][at] * factor))

    def _change(self, r: int, of: Callable[[Any], Any]) -> None:
        """Replace what is mixed for a row, channel by channel."""
        mixed = self.mixed[r]
        self._each_channel(lambda at: I.buffer_store(mixed, of(mixed[at]), [at]))

    def _each_channel(self, emit: Callable[[Any], None]) -> None:
        for begin, parts in self._channels():
            for i, lanes in enumerate(parts):
                with self.kernel.vector(lanes) as lane:
                    emit(lane + (begin + i * lanes))

    def _channels(self) -> Iterator[tuple[int, list[int]]]:
        """Yield runs of channels: where each begins, and the vectors that it is; the longest ones first."""
        begin, lanes = 0, self.kernel.isa.lanes
        while begin < self.shape.channels:
            left = self.shape.channels - begin
            while lanes > left:
                lanes //= 2
            parts = [lanes] * (2 if left >= 2 * lanes and lanes == self.kernel.isa.lanes else 1)
            yield begin, parts
            begin += sum(parts)


RULES: dict[Any, Callable[..., Any]] = {torch.ops.specqd.attention.default: _attention}

"""The register-tiled product that convolutions and matrix products share: words of inputs times vectors of weights.

A task computes some blocks of 16 output channels for some rows of pixels. It goes over the inputs in passes,
so that the weights of a pass stay in the first cache while all pixels of the task use them; sums wait in
memory of the task meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from specqd.codegen.dense_kernels.layout import OUT
from specqd.codegen.dense_kernels.operands import Operands, sum_type
from specqd.codegen.dense_kernels.tiling import Tiling, passes
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, i32, load, local, prefetch, splat, store, tirx

__all__ = ["Product", "bands", "locate", "serial"]


def locate(task: Any, bands: int, parts: int, by_band: bool) -> tuple[Any, Any, Any]:
    """Return the product of the batch, the band of rows and the part of the channels of a task.

    Threads take neighbouring tasks: `by_band`, they share out the rows, otherwise the channels.
    """
    inner, outer = (parts, bands) if by_band else (bands, parts)
    first, second = bind(task // inner % outer), bind(task % inner)
    return (bind(task // (bands * parts)), *((first, second) if by_band else (second, first)))


def bands(rows: int | None, high: int, count: Any) -> list[tuple[int, Any, Any]]:
    """Cut the `count` rows of a task into tiles of `high` rows and a rest: `(rows of a tile, how many, first row)`.

    Tasks are whole tiles but for the last of the image. If its `rows` are open, the rest is made of powers of two.
    """
    full = bind(tirx.truncdiv(count, i32(high)))
    cut = [(high, full, i32(0))]
    rest = bind(count - full * high)
    if rows is not None:
        return [*cut, (rows % high, tirx.min(i32(1), rest), full * high)] if rows % high else cut
    for bit in range((high - 1).bit_length()):
        above = tirx.shift_left(tirx.shift_right(rest, i32(bit + 1)), i32(bit + 1))
        once = tirx.bitwise_and(tirx.shift_right(rest, i32(bit)), i32(1))
        cut.append((1 << bit, once, full * high + above))
    return cut


@contextmanager
def serial(extent: Any) -> Iterator[Any]:
    """Open a loop, unless it is known to run once."""
    if isinstance(extent, int) and extent == 1:
        yield i32(0)
    else:
        with I.serial(0, extent) as var:
            yield var


@dataclass(frozen=True)
class Product:
    """Emits tasks of one product.

    Attributes:
        columns: of the output.
    """

    isa: ISA
    of: Operands
    columns: int
    tiling: Tiling

    @property
    def sums(self) -> int:
        """Elements that the sums of a task take, `[pixels, blocks, 16]`."""
        return self.tiling.task * self.columns * self.tiling.blocks * OUT

    def task(self, sums: Any, first: Any, at: Any, pieces: list[tuple[int, Any, Any]], into: Any = 0) -> None:
        """Compute blocks from `first` for pixels whose inputs begin at word `at`, into `sums` from `into` on.

        `pieces` cut the task's rows into tiles: `(rows of a tile, how many tiles, first row)`.
        """
        of, full = self.of, self.of.full
        each = passes(full, of.taps[0] * of.taps[1], of.size, self.tiling.words) if full else 1
        alone = of.words == each * of.size or not full
        if not alone:
            self._clear(sums, into)
        if full:
            with serial(full // each) as part:
                self._pass((sums, into), first, at, pieces, (bind(part * each), each, of.size), alone)
        if of.tail:
            self._pass((sums, into), first, at, pieces, (i32(full), 1, of.tail), alone)

    def _clear(self, sums: Any, into: Any) -> None:
        lanes = self.isa.lanes
        with I.serial(0, self.sums // lanes) as s:
            store(sums, into + s * lanes, self._zero(), lanes)

    def _zero(self) -> Any:
        return splat(tirx.const(0, sum_type(self.of.dtype)), self.isa.lanes)

    def _pass(
        self, sums: tuple[Any, Any], first: Any, at: Any, pieces: Any, part: tuple[Any, int, int], alone: bool
    ) -> None:
        wide = self.tiling.columns
        rest = self.columns % wide
        ahead = self._ahead(first, part)
        for high, repeats, row in pieces:
            with serial(repeats) as r:
                top = bind(row + r * high)
                with serial(self.columns // wide) as c:
                    self._tile(sums, first, at, part, (top, c * wide), (high, wide), alone, ahead)
                if rest:
                    corner = top, i32(self.columns - rest)
                    self._tile(sums, first, at, part, corner, (high, rest), alone, ahead)

    def _ahead(self, first: Any, part: tuple[Any, int, int]) -> list[Any]:
        """Lines where the weights begin that the pass after `part` reads, or else the task after this one."""
        block, blocks, _ = part
        after, every = bind((block + blocks) * (self.of.size * self.of.lines)), self.of.words * self.of.lines
        place = tirx.Select(after < every, after, i32(self.tiling.blocks * every))
        return [bind((first + j) * every + place) for j in range(self.tiling.blocks)]

    def _tile(
        self,
        sums: tuple[Any, Any],
        first: Any,
        at: Any,
        part: tuple[Any, int, int],
        corner: tuple[Any, Any],
        shape: tuple[int, int],
        alone: bool,
        ahead: list[Any],
    ) -> None:
        block, blocks, words = part
        of, x = self.of, self.of.inputs
        pixels = [(r, c) for r in range(shape[0]) for c in range(shape[1])]
        width, lanes = self.tiling.blocks * OUT, self.isa.lanes
        memory, into = sums
        origin = bind(into + (corner[0] * self.columns + corner[1]) * width)
        acc = [local(width, sum_type(self.of.dtype)) for _ in pixels]
        places = [origin + (r * self.columns + c) * width for r, c in pixels]
        for row, place in zip(acc, places, strict=True):
            for i in range(0, width, lanes):
                store(row, i, self._zero() if alone else load(memory, place + i, lanes), lanes)
        begin = bind(at + corner[0] * x.row + corner[1] * x.column + block * x.block)
        weights = [
            bind((first + j) * (of.words * of.lines) + block * (of.size * of.lines))
            for j in range(self.tiling.blocks)
        ]
        unroll = next(u for u in (4, 3, 2, 1) if words % u == 0)
        # Each tile of a pass, at each of its steps, asks for as many lines that the next pass reads.
        across = -(-self.columns // self.tiling.columns)
        asked = -(-unroll // (-(-self.tiling.task // self.tiling.rows) * across))
        tile = corner[0] // self.tiling.rows * across + corner[1] // self.tiling.columns
        earlier = bind(tile * (blocks * of.lines * (words // unroll)))
        with (
            serial(blocks) as b,
            serial(of.taps[0]) as h,
            serial(of.taps[1]) as w,
            serial(words // unroll) as s,
        ):
            word = bind(begin + b * x.block + h * x.tap_row + w * x.tap_column + s * (unroll * x.word))
            step = bind(((b * of.taps[0] + h) * of.taps[1] + w) * (words // unroll) + s)
            line = bind(step * unroll)
            for start in ahead:
                for i in range(asked):
                    line_ahead = start + (earlier + step) * asked + i
                    prefetch(of.weight, line_ahead * self._line, 2)
            for u in range(unroll):
                loaded = [self._weights(at_block + line + u) for at_block in weights]
                for row, (r, c) in zip(acc, pixels, strict=True):
                    self._add(row, loaded, word + r * x.row + c * x.column + u * x.word)
        for row, place in zip(acc, places, strict=True):
            for i in range(0, width, lanes):
                store(memory, place + i, load(row, i, lanes), lanes)

    @property
    def _line(self) -> int:
        """Elements of a cache line of weights."""
        return OUT * 4 if sum_type(self.of.dtype) == "int32" else OUT

    def _weights(self, line: Any) -> list[Any]:
        lanes = self.isa.lanes
        if sum_type(self.of.dtype) == "int32":
            return [
                bind(load(self.of.weight, line * (OUT * 4) + v * 4, lanes * 4)) for v in range(0, OUT, lanes)
            ]
        loaded = [load(self.of.weight, line * OUT + v, lanes) for v in range(0, OUT, lanes)]
        return [self.isa.bf16_prepare(w) if self.of.dtype == "bfloat16" else bind(w) for w in loaded]

    def _add(self, row: Any, loaded: list[list[Any]], word: Any) -> None:
        lanes = self.isa.lanes
        x = self._input(bind(self.of.inputs.buffer[word]))
        for i, w in enumerate(w for block in loaded for w in block):
            old = load(row, i * lanes, lanes)
            if self.of.dtype == "float32":
                new = self.isa.fma(w, x, old)
            elif self.of.dtype == "bfloat16":
                new = self.isa.bf16_dot(old, w, x)
            else:
                new = self.isa.dot_bytes(old, x, w)
            store(row, i * lanes, new, lanes)

    def _input(self, word: Any) -> Any:
        lanes = self.isa.lanes
        if self.of.dtype == "float32":
            return bind(splat(word, lanes))
        if self.of.dtype == "bfloat16":
            if self.isa.pairs:
                return word
            low = tirx.reinterpret("float32", tirx.shift_left(word, i32(16)))
            return bind(low), bind(tirx.reinterpret("float32", tirx.bitwise_and(word, i32(-65536))))
        if self.of.dtype == "int8":
            word = tirx.bitwise_xor(word, i32(-0x7F7F7F80))  # each byte + 128
        return bind(tirx.reinterpret(f"int8x{lanes * 4}", splat(word, lanes)))

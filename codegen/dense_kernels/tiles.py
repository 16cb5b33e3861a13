"""The product of convolutions and matrices in tiles of AMX: 16 pixels times 16 channels times 64 bytes of inputs.

Pixels of a tile are evenly spaced in memory. A *line* is a run of such pixels: a row of the output, or, where
that takes fewer tiles, a piece of the whole padded image with the pixels beside it, which are computed and
not stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specqd.codegen.dense_kernels.layout import OUT
from specqd.codegen.dense_kernels.operands import Operands
from specqd.codegen.dense_kernels.product import serial
from specqd.codegen.kernels.tiles import configure, instruction, row_pieces
from specqd.codegen.tir import I, bind, i32, tirx

__all__ = ["ROWS", "TileProduct"]

#: rows of a tile, and words of a row
ROWS = 16

_MULTIPLY = {"bfloat16": "tdpbf16ps", "int8": "tdpbssd", "uint8": "tdpbusd"}

#: write(pixel of the line, channel, sums, their first element)
Write = Callable[[Any, Any, Any, Any], None]


@dataclass(frozen=True)
class TileProduct:
    """Emits the tiles of one product.

    Attributes:
        of: with blocks of at most 16 words.
        blocks: of output channels that a task computes.
    """

    of: Operands
    blocks: int

    @property
    def _wide(self) -> int:
        """Blocks of channels at a time; tiles of another shape for a tail leave room for one."""
        return 1 if (self.of.tail and self.of.full) or self.blocks % 2 else 2

    def line(self, sums: Any, first: Any, at: Any, pixels: int, write: Write) -> None:
        """Compute blocks from `first` for `pixels` whose inputs begin at word `at`; `sums` has 1024 elements."""
        for start, sizes, repeats in row_pieces(pixels):
            self._configure(sizes)
            with serial(repeats) as p:
                self._piece(sums, first, at, bind(start + p * sum(sizes)), sizes, write)

    def open_line(self, sums: Any, first: Any, at: Any, pixels: Any, write: Write) -> None:
        """Compute a line whose length is known when the kernel runs."""
        with serial(bind((pixels + ROWS - 1) // ROWS)) as p:
            size = bind(tirx.min(i32(ROWS), pixels - p * ROWS))
            self._configure((size,))
            self._piece(sums, first, at, bind(p * ROWS), (size,), write)

    def _names(self, height: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Tiles by number: of sums; of inputs and of weights, for whole blocks and for the tail."""
        wide = self._wide
        sums = [[m * wide + j for j in range(wide)] for m in range(height)]
        free = iter(range(height * wide, 8))
        inputs, weights = [], []
        for _ in range(2 if self.of.full and self.of.tail else 1):
            inputs.append([next(free) for _ in range(height)])
            weights.append([next(free) for _ in range(wide)])
        return sums, inputs, weights

    def _configure(self, sizes: tuple[Any, ...]) -> None:
        """Say what shape each tile has."""
        sums, inputs, weights = self._names(len(sizes))
        shapes: dict[int, tuple[Any, int]] = {}
        widths = [w for w in (self.of.size if self.of.full else 0, self.of.tail) if w]
        for m, size in enumerate(sizes):
            shapes.update(dict.fromkeys(sums[m], (size, 64)))
            shapes.update({of[m]: (size, 4 * width) for of, width in zip(inputs, widths, strict=True)})
        for of, width in zip(weights, widths, strict=True):
            shapes.update(dict.fromkeys(of, (width, 64)))
        configure(shapes)

    def _piece(self, out: Any, first: Any, at: Any, pixel: Any, sizes: tuple[Any, ...], write: Write) -> None:
        wide = self._wide
        sums, inputs, weights = self._names(len(sizes))
        begin = bind(at + pixel * self.of.inputs.column)
        with serial(self.blocks // wide) as group:
            block = bind(first + group * wide)
            for tile in (t for of in sums for t in of):
                instruction("tilezero", tile)
            if self.of.full:
                with serial(self.of.full) as b:
                    self._multiply(begin, block, b, self.of.size, (sums, inputs[0], weights[0]))
            if self.of.tail:
                self._multiply(begin, block, i32(self.of.full), self.of.tail, (sums, inputs[-1], weights[-1]))
            for m, of in enumerate(sums):
                for j, tile in enumerate(of):
                    instruction("tilestored64", tile, pointer=(out, (m * 2 + j) * ROWS * OUT), stride=64)
            for m, size in enumerate(sizes):
                with I.serial(0, size) as r:
                    place = bind(pixel + m * ROWS + r)
                    for j in range(wide):
                        write(place, (block + j) * OUT, out, ((m * 2 + j) * ROWS + r) * OUT)

    def _multiply(self, begin: Any, first: Any, block: Any, words: int, tiles: Any) -> None:
        sums, inputs, weights = tiles
        of, x = self.of, self.of.inputs
        height, width = of.taps
        with serial(height) as h, serial(width) as w:
            place = bind(begin + block * x.block + h * x.tap_row + w * x.tap_column)
            line = bind(block * (of.size * height * width) + (h * width + w) * words)
            for m, tile in enumerate(inputs):
                where = (x.buffer, place + m * (ROWS * x.column))
                instruction("tileloadd64", tile, pointer=where, stride=4 * x.column)
            for j, tile in enumerate(weights):
                elements = OUT * (1 if of.dtype == "bfloat16" else 4)
                at = ((first + j) * (of.words * height * width) + line) * elements
                instruction("tileloadd64", tile, pointer=(of.weight, at), stride=64)
                for m, operand in enumerate(inputs):
                    instruction(_MULTIPLY[of.dtype], sums[m][j], operand, tile)

"""Convolutions of 3 x 3 taps by Winograd's F(2 x 2, 3 x 3): 16 products for four outputs of a channel, not 36.

A tile is 4 x 4 inputs and the 2 x 2 outputs that they give. With inputs d and weights g transformed to B'dB and GgG',
the outputs are A'[GgG' . B'dB]A (Lavin and Gray, arXiv 1509.09308, section 4.1): at each of 16 positions, a product
of tiles and channels. Transforming inputs and outputs takes only sums and differences, so that rounding does as little
harm as in direct sums. An infinite input makes the outputs NaN that direct sums make infinite or NaN, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from specqd.codegen.dense_kernels.epilogue import Ending
from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT, PATCH, POSITIONS, blocked_shape
from specqd.codegen.dense_kernels.operands import Inputs, Operands
from specqd.codegen.dense_kernels.product import Product, bands, locate
from specqd.codegen.dense_kernels.spec import ConvSpec
from specqd.codegen.dense_kernels.winograd_tasks import Cut, cuts, sizes, tile
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, f32, i32, load, local, splat, store, tirx

__all__ = ["winograd_convolution"]

Vector = Callable[[int, int], Any]


def winograd_convolution(spec: ConvSpec, isa: ISA, symbol: str, cut: Cut | None = None) -> Any:
    """Return the function of a spec that `layout.by_winograd` holds of; `cut` is one of `cuts`."""
    made = _Winograd(spec, isa, cut)
    kernel, cut, rows = made.kernel, made.cut, made.grid[0]
    count = -(-rows // cut.rows)
    with kernel.launch(), kernel.phase(spec.batch * count * cut.parts) as task:
        batch, band, part = locate(task, count, cut.parts, made.by_band)
        top, first = bind(band * cut.rows), bind(part * made.each)
        height = bind(tirx.min(i32(cut.rows), rows - top)) if rows % cut.rows else i32(cut.rows)
        patches = kernel.scratch(POSITIONS * made.blocks[0] * made.plane, "float32")
        sums = kernel.scratch(POSITIONS * made.each * made.plane, "float32")
        made.inputs(patches, batch, top, height)
        made.products(sums, patches, first, height)
        made.outputs(sums, batch, first, top, height)
    return kernel.function(symbol)


class _Winograd:
    """The arguments `(x, weight, [bias], [residual], out)`, and the three steps of a task.

    Attributes:
        grid: rows and columns of tiles.
        blocks: of 16 input channels, and of 16 output channels; `each` of these in a task.
        plane: elements of 16 channels of the tiles of a task.
        by_band: threads share the image, not the weights, where that is less to read.
    """

    def __init__(self, spec: ConvSpec, isa: ISA, cut: Cut | None) -> None:
        self.spec, self.isa, self.kernel = spec, isa, Kernel(isa)
        self.grid, self.blocks = sizes(spec)
        self.cut = cut or cuts(spec, isa)[0]
        self.tiling = replace(tile(spec, isa), task=self.cut.rows)
        self.each = self.blocks[1] // self.cut.parts
        self.plane = self.cut.rows * self.grid[1] * OUT
        shape = blocked_shape(spec.batch, spec.in_channels, spec.height, spec.width, spec.dtype)
        self.x = self.kernel.argument("x", shape, "float32")
        words = POSITIONS * self.blocks[1], spec.in_channels, OUT, 1
        self.weight = self.kernel.argument("weight", words, "float32")
        self.shape = blocked_shape(
            spec.batch, spec.out_channels, spec.out_height, spec.out_width, spec.out_dtype
        )
        self.ending = Ending(self.kernel, isa, spec, self.blocks[1] * OUT, self.shape)
        self.by_band = spec.height * spec.width > POSITIONS * spec.out_channels

    def inputs(self, patches: Any, batch: Any, top: Any, height: Any) -> None:
        """Write B'dB of the rows of tiles from `top`: `patches [position, block, tile, 16 channels]`."""
        spec, (blocks, _), columns = self.spec, self.blocks, self.grid[1]
        with I.serial(0, blocks) as block, I.serial(0, height) as row, I.serial(0, columns) as column:
            y, x = bind((top + row) * 2 - spec.padding[0]), bind(column * 2 - spec.padding[1])
            to = bind(block * self.plane + (row * columns + column) * OUT)
            image = bind((batch * blocks + block) * (spec.height * spec.width * OUT))
            whole = tirx.all(y >= 0, y + PATCH <= spec.height, x >= 0, x + PATCH <= spec.width)
            with I.If(whole):
                with I.Then():
                    self._patch(image, (y, x), patches, to, whole=True)
                with I.Else():
                    self._patch(image, (y, x), patches, to, whole=False)

    def _patch(self, image: Any, corner: tuple[Any, Any], patches: Any, to: Any, *, whole: bool) -> None:
        """Write B'dB of the pixels from `corner`; those outside the image are zero, unless it is `whole`."""
        spec, lanes = self.spec, self.isa.lanes
        for v in range(0, OUT, lanes):

            def pixel(r: int, c: int, v: int = v) -> Any:
                y, x = corner[0] + r, corner[1] + c
                value = load(self.x, image + (y * spec.width + x) * OUT + v, lanes)
                there = tirx.all(y >= 0, y < spec.height, x >= 0, x < spec.width)
                return value if whole else tirx.if_then_else(there, value, splat(f32(0.0), lanes))

            for position, value in enumerate(_transformed(pixel, _of_inputs)):
                store(patches, to + position * self.blocks[0] * self.plane + v, value, lanes)

    def products(self, sums: Any, patches: Any, first: Any, height: Any) -> None:
        """Write the products of tiles and the blocks from `first`: `sums [position, blocks, tile, blocks, 16]`."""
        columns, wide, (inputs, outputs) = self.grid[1], self.tiling.blocks, self.blocks
        where = Inputs(patches, block=self.plane, word=1, row=columns * OUT, column=OUT)
        of = Operands("float32", where, self.weight, (1, 1), self.spec.in_channels, OUT)
        product = Product(self.isa, of, columns, self.tiling)
        pieces = bands(self.grid[0], self.tiling.rows, height)
        with I.serial(0, POSITIONS) as position, I.serial(0, self.each // wide) as group:
            at = bind(position * (inputs * self.plane))
            block = bind(position * outputs + first + group * wide)
            into = bind((position * self.each + group * wide) * self.plane)
            product.task(sums, block, at, pieces, into)

    def outputs(self, sums: Any, batch: Any, first: Any, top: Any, height: Any) -> None:
        """End A'mA of the sums m of each tile, and write what of it lies in the image."""
        wide, columns, lanes = self.tiling.blocks, self.grid[1], self.isa.lanes
        with (
            I.serial(0, self.each // wide) as group,
            I.serial(0, height) as row,
            I.serial(0, columns) as column,
        ):
            at = bind(group * (wide * self.plane) + (row * columns + column) * (wide * OUT))
            corner = bind((top + row) * 2), bind(column * 2)
            for j in range(wide):
                found = local(4 * OUT, "float32")
                for v in range(0, OUT, lanes):

                    def value(r: int, c: int, at: Any = at, v: int = j * OUT + v) -> Any:
                        return load(sums, at + (r * PATCH + c) * self.each * self.plane + v, lanes)

                    for i, output in enumerate(_transformed(value, _of_outputs)):
                        store(found, i * OUT + v, output, lanes)
                self._write(found, batch, bind((first + group * wide + j) * OUT), corner)

    def _write(self, found: Any, batch: Any, channel: Any, corner: tuple[Any, Any]) -> None:
        spec, size = self.spec, self.shape[-1]
        plane = bind((batch * self.shape[1] + channel // size) * (spec.out_height * spec.out_width))
        for i in range(4):
            row, column = corner[0] + i // 2, corner[1] + i % 2
            to = (plane + row * spec.out_width + column) * size + channel % size
            with I.If(tirx.all(row < spec.out_height, column < spec.out_width)), I.Then():
                self.ending.write(found, i * OUT, channel, to)


def _transformed(matrix: Vector, by: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """Transform a matrix of vectors by a function of its columns and then of its rows; row by row."""
    columns = [by([bind(matrix(r, c)) for r in range(PATCH)]) for c in range(PATCH)]
    return [value for row in zip(*columns, strict=True) for value in by(row)]


def _of_inputs(d: Sequence[Any]) -> list[Any]:
    """B'd of a column d."""
    return [bind(d[0] - d[2]), bind(d[1] + d[2]), bind(d[2] - d[1]), bind(d[1] - d[3])]


def _of_outputs(m: Sequence[Any]) -> list[Any]:
    """A'm of a column m."""
    return [bind(m[0] + m[1] + m[2]), bind(m[1] - m[2] - m[3])]

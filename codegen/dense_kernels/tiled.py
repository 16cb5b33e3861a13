"""Convolutions and matrix products of BF16 and integers on CPUs with AMX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specqd.codegen.dense_kernels.convolution import Convolution
from specqd.codegen.dense_kernels.layout import OUT
from specqd.codegen.dense_kernels.matrix import Matrix
from specqd.codegen.dense_kernels.operands import sum_type
from specqd.codegen.dense_kernels.product import locate
from specqd.codegen.dense_kernels.spec import ConvSpec, GemmSpec
from specqd.codegen.dense_kernels.tiles import ROWS, TileProduct
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.tiles import release
from specqd.codegen.kernels.tiling import THREADS
from specqd.codegen.tir import I, bind, i32, tirx

__all__ = ["Tasks", "tasks", "tiled_convolution", "tiled_matrix_product"]

#: pixels of a line that is no row of the output
_LINE = 64
#: blocks of output channels of a task, at most
_BLOCKS = 8
_SUMS = 4 * ROWS * OUT


@dataclass(frozen=True)
class _Lines:
    """How the pixels of an image are cut: `count` lines of `pixels`, the last of `last`.

    `width` is None if a line is a row of the output, else how many pixels there are from row to row.
    """

    count: int
    pixels: int
    last: int
    width: int | None = None

    @classmethod
    def of(cls, spec: ConvSpec) -> _Lines:
        """Choose what takes fewer tiles."""
        rows, columns, width = spec.out_height, spec.out_width, spec.padded[1]
        whole = (rows - 1) * width + columns
        if spec.stride[0] != spec.stride[1] or rows * -(-columns // ROWS) < -(-whole // ROWS):
            return cls(rows, columns, columns)
        count = -(-whole // _LINE)
        return cls(count, _LINE, whole - (count - 1) * _LINE, width)


@dataclass(frozen=True)
class Tasks:
    """`blocks` of 16 output channels and `pixels` a task."""

    blocks: int
    pixels: int = 128


def tasks(blocks: int) -> list[Tasks]:
    """Return how many of `blocks` a task may have, a divisor: first an even one, if there is one, of the usual size."""
    divisors = [n for n in range(1, 2 * _BLOCKS + 1) if blocks % n == 0]
    usual = max((n for n in divisors if n <= _BLOCKS), key=lambda n: (n % 2 == 0, n))
    others = [Tasks(n, pixels) for n in reversed(divisors) for pixels in (128, 64, 256, 32)]
    return [Tasks(usual), *(one for one in others if one != Tasks(usual))]


def tiled_convolution(spec: ConvSpec, isa: ISA, symbol: str, cut: Tasks | None = None) -> Any:
    """Return the function, as `blocked_convolution` does."""
    made = Convolution(isa, spec)
    kernel, image, inputs = made.kernel, made.image, made.operands.inputs
    cut = cut or tasks(made.out_blocks // spec.groups)[0]
    blocks = cut.blocks
    product = TileProduct(made.operands, blocks)
    lines = _Lines.of(spec)
    step = inputs.row if lines.width is None else lines.pixels * inputs.column
    high = max(1, min(cut.pixels // lines.pixels, -(-lines.count // THREADS)))
    parts, count = made.out_blocks // blocks, -(-lines.count // high)
    with kernel.launch():
        image.fill()
        with kernel.phase(spec.batch * count * parts) as task:
            batch, band, part = locate(task, count, parts, made.by_band)
            sums = kernel.scratch(_SUMS, sum_type(spec.dtype))
            begin, first = bind(batch * image.batch + made.group(part, parts)), bind(part * blocks)
            with I.serial(0, bind(tirx.min(i32(high), lines.count - band * high))) as i:
                line = bind(band * high + i)
                at = bind(begin + line * step)

                def write(pixel: Any, channel: Any, out: Any, out_at: Any) -> None:
                    whole = bind(line * lines.pixels + pixel)
                    if lines.width in (None, spec.out_width):
                        made.ending.write(out, out_at, channel, made.place(batch, channel, whole))
                        return
                    with I.If(whole % lines.width < spec.out_width), I.Then():
                        inside = whole // lines.width * spec.out_width + whole % lines.width
                        made.ending.write(out, out_at, channel, made.place(batch, channel, inside))

                if lines.last == lines.pixels:
                    product.line(sums, first, at, lines.pixels, write)
                else:
                    with I.If(line < lines.count - 1):
                        with I.Then():
                            product.line(sums, first, at, lines.pixels, write)
                        with I.Else():
                            product.line(sums, first, at, lines.last, write)
            release()
    return kernel.function(symbol)


def tiled_matrix_product(spec: GemmSpec, isa: ISA, symbol: str, cut: Tasks | None = None) -> Any:
    """Return the function, as `matrix_product` does."""
    made = Matrix(isa, spec, ROWS)
    cut = cut or tasks(made.blocks)[0]
    kernel, blocks = made.kernel, cut.blocks
    product = TileProduct(made.operands, blocks)
    each = made.tasks(made.blocks // blocks, cut.pixels, ROWS)
    with kernel.launch(), each as (_, part, top, height):
        sums = kernel.scratch(_SUMS, sum_type(spec.dtype))
        first, at = bind(part * blocks), bind(top * made.operands.words)

        def write(pixel: Any, channel: Any, out: Any, out_at: Any) -> None:
            made.write(out, out_at, bind(top + pixel), bind(channel))

        with I.If(height == cut.pixels):
            with I.Then():
                product.line(sums, first, at, cut.pixels, write)
            with I.Else():
                if spec.m is not None:
                    product.line(sums, first, at, spec.m % cut.pixels, write)
                else:
                    product.open_line(sums, first, at, height, write)
        release()
    return kernel.function(symbol)

"""Convolutions of blocks of channels: the padded input, then the register-tiled product over its pixels."""

from __future__ import annotations

from math import prod
from typing import Any

from specqd.codegen.dense_kernels.epilogue import Ending
from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT, blocked_shape, pieces, taps
from specqd.codegen.dense_kernels.operands import Operands, sum_type, weight_view
from specqd.codegen.dense_kernels.padding import Image
from specqd.codegen.dense_kernels.product import Product, bands, locate
from specqd.codegen.dense_kernels.spec import PER_WORD, ConvSpec
from specqd.codegen.dense_kernels.tiling import Tiling, tiling
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, i32, tirx

__all__ = ["Convolution", "blocked_convolution"]


class Convolution:
    """The arguments `(x, weight, [correction, [scale, [steps]]], [bias], [residual], out)` and where they lie."""

    def __init__(self, isa: ISA, spec: ConvSpec) -> None:
        """Open the function and declare them."""
        self.kernel, self.spec = Kernel(isa), spec
        words, size = pieces(spec)
        self.out_blocks, tapped = -(-spec.out_channels // OUT), taps(spec)
        self.image = Image(self.kernel, isa, spec)
        shape = self.out_blocks, words * prod(tapped), OUT, PER_WORD[spec.dtype]
        weight = self.kernel.argument("weight", shape, *weight_view(spec.dtype))
        self.operands = Operands(spec.dtype, self.image.inputs, weight, tapped, words, size)
        self.shape = blocked_shape(
            spec.batch, spec.out_channels, spec.out_height, spec.out_width, spec.out_dtype
        )
        self.ending = Ending(self.kernel, isa, spec, self.out_blocks * OUT, self.shape)
        #: threads share the image, not the weights, where that is less to read
        self.by_band = self.image.batch > prod(shape[:-1])

    def group(self, part: Any, parts: int) -> Any:
        """Return the words before the inputs of one of `parts` parts of the output channels."""
        blocks = self.operands.full + bool(self.operands.tail)
        return part // (parts // self.spec.groups) * (blocks * self.image.block)

    def place(self, batch: Any, channel: Any, pixel: Any) -> Any:
        """Return where an output lies; `pixel` counts row by row."""
        size, area = self.shape[-1], self.spec.out_height * self.spec.out_width
        return ((batch * self.shape[1] + channel // size) * area + pixel) * size + channel % size


def blocked_convolution(spec: ConvSpec, isa: ISA, symbol: str, tiles: Tiling | None = None) -> Any:
    """Return the function; groups, if there are several, are whole blocks of inputs and outputs."""
    made = Convolution(isa, spec)
    kernel, image, out_blocks = made.kernel, made.image, made.out_blocks
    rows, columns = spec.out_height, spec.out_width
    tiles = tiles or tiling(isa, rows, columns, out_blocks // spec.groups, spec.groups * spec.batch)
    product = Product(isa, made.operands, columns, tiles)
    parts, count = out_blocks // tiles.blocks, -(-rows // tiles.task)
    with kernel.launch():
        image.fill()
        with kernel.phase(spec.batch * count * parts) as task:
            batch, band, part = locate(task, count, parts, made.by_band)
            sums = kernel.scratch(product.sums, sum_type(spec.dtype))
            first, top = bind(part * tiles.blocks), bind(band * tiles.task)
            at = bind(batch * image.batch + top * made.operands.inputs.row + made.group(part, parts))
            height = bind(tirx.min(i32(tiles.task), rows - top)) if rows % tiles.task else i32(tiles.task)
            product.task(sums, first, at, bands(rows, tiles.rows, height))
            channels = [bind((first + j) * OUT) for j in range(tiles.blocks)]
            places = [bind(made.place(batch, channel, top * columns)) for channel in channels]
            with I.serial(0, height * columns) as pixel:
                for j, (channel, place) in enumerate(zip(channels, places, strict=True)):
                    at = (pixel * tiles.blocks + j) * OUT
                    made.ending.write(sums, at, channel, place + pixel * made.shape[-1])
    return kernel.function(symbol)

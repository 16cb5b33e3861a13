"""Convolutions of blocks of channels: the padded input, then the register-tiled product over its pixels."""

from __future__ import annotations

from typing import Any

from specqd.codegen.dense_kernels.epilogue import Ending
from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT, block, blocked_shape, pieces
from specqd.codegen.dense_kernels.padding import Image
from specqd.codegen.dense_kernels.product import Product, bands, sum_type, weight_view
from specqd.codegen.dense_kernels.spec import PER_WORD, ConvSpec
from specqd.codegen.dense_kernels.tiling import tiling
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, i32, parallel, tirx

__all__ = ["blocked_convolution"]


def blocked_convolution(spec: ConvSpec, isa: ISA, symbol: str) -> Any:
    """Return the function `(x, weight, [correction, [scale]], [bias], [residual], out)`.

    Groups, if there are several, are whole blocks of inputs and outputs.
    """
    kernel = Kernel(isa)
    image = Image(kernel, isa, spec)
    (words, size), per = pieces(spec), PER_WORD[spec.dtype]
    out_blocks, taps = -(-spec.out_channels // OUT), spec.kernel[0] * spec.kernel[1]
    weight = kernel.argument("weight", (out_blocks, words * taps, OUT, per), *weight_view(spec.dtype))
    rows, columns = spec.out_height, spec.out_width
    shape = blocked_shape(spec.batch, spec.out_channels, rows, columns, spec.out_dtype)
    ending = Ending(kernel, isa, spec, out_blocks * OUT, shape)

    tiles = tiling(isa, rows, columns, out_blocks // spec.groups, spec.groups * spec.batch)
    product = Product(isa, spec.dtype, image.inputs, weight, spec.kernel, words, size, columns, tiles)
    parts, bands = out_blocks // tiles.blocks, -(-rows // tiles.task)
    with kernel.launch():
        image.fill()
        with kernel.phase(), parallel(spec.batch * bands * parts) as task:
            part, band, batch = bind(task % parts), bind(task // parts % bands), bind(task // (parts * bands))
            sums = kernel.scratch(product.sums, sum_type(spec.dtype))
            first, top = bind(part * tiles.blocks), bind(band * tiles.task)
            group = part // (parts // spec.groups)
            at = batch * image.batch + top * product.inputs.row + group * (-(-words // size) * image.block)
            count = tirx.min(i32(tiles.task), rows - top) if rows % tiles.task else i32(tiles.task)
            product.task(sums, first, bind(at), bands(rows, tiles.rows, count))
            _end(spec, ending, tiles.blocks, sums, (batch, first, top), count * columns)
    return kernel.function(symbol)


def _end(spec: ConvSpec, ending: Ending, blocks: int, sums: Any, corner: tuple[Any, Any, Any], pixels: Any) -> None:
    batch, first, top = corner
    size, area = block(spec.out_channels, spec.out_dtype), spec.out_height * spec.out_width
    out_blocks = -(-spec.out_channels // size)
    channels = [bind((first + j) * OUT) for j in range(blocks)]
    places = [
        bind(((batch * out_blocks + c // size) * area + top * spec.out_width) * size + c % size) for c in channels
    ]
    with I.serial(0, pixels) as pixel:
        for j in range(blocks):
            ending.write(sums, (pixel * blocks + j) * OUT, channels[j], places[j] + pixel * size)

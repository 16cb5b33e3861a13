"""Matrix products of row-major activations: with a packed weight, or with another activation that is packed first."""

from __future__ import annotations

from typing import Any

from specqd.codegen.dense_kernels.epilogue import Ending
from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT, pieces
from specqd.codegen.dense_kernels.packing import pack_activation
from specqd.codegen.dense_kernels.product import Inputs, Product, bands, sum_type, view_type, weight_view
from specqd.codegen.dense_kernels.spec import PER_WORD, GemmSpec
from specqd.codegen.dense_kernels.tiling import tiling
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, i32, parallel, tirx

__all__ = ["matrix_product"]


def matrix_product(spec: GemmSpec, isa: ISA, symbol: str) -> Any:
    """Return the function `(x, second, [correction, [scale]], [bias], [residual], out)`."""
    kernel = Kernel(isa)
    (words, size), per = pieces(spec), PER_WORD[spec.dtype]
    blocks = -(-spec.n // OUT)
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    lead = (spec.batch,) if spec.dynamic else ()
    x = kernel.argument("x", (*lead, m, spec.k), spec.dtype, view_type(spec.dtype))
    if spec.dynamic:
        shape = (spec.n, spec.k) if spec.transposed else (spec.k, spec.n)
        second = kernel.argument("second", (spec.batch, *shape), "float32")
    else:
        weight = kernel.argument("weight", (blocks, words, OUT, per), *weight_view(spec.dtype))
    ending = Ending(kernel, isa, spec, blocks * OUT, (*lead, m, spec.n))
    if spec.dynamic:
        weight = kernel.scratch(spec.batch * blocks * words * OUT, "float32")

    tiles = tiling(isa, spec.m, 1, blocks, spec.batch)
    inputs = Inputs(x, block=size, word=1, row=words, column=0)
    product = Product(isa, spec.dtype, inputs, weight, (1, 1), words, size, 1, tiles)
    rows = tirx.Cast("int32", m) if spec.m is None else spec.m
    parts, tasks = blocks // tiles.blocks, -(-rows // tiles.task) if spec.m else (rows + tiles.task - 1) // tiles.task
    with kernel.launch():
        if spec.dynamic:
            with kernel.phase():
                pack_activation(spec, isa, second, weight)
        with kernel.phase(), _tasks(spec.batch * tasks * parts) as task:
            part, band, batch = bind(task % parts), bind(task // parts % tasks), bind(task // (parts * tasks))
            sums = kernel.scratch(product.sums, sum_type(spec.dtype))
            first, top = bind(part * tiles.blocks), bind(band * tiles.task)
            row = bind(batch * rows + top)
            even = isinstance(rows, int) and rows % tiles.task == 0
            count = i32(tiles.task) if even else bind(tirx.min(i32(tiles.task), rows - top))
            product.task(sums, first + batch * blocks, bind(row * words), bands(spec.m, tiles.rows, count))
            with I.serial(0, count) as r:
                _end(spec, ending, tiles.blocks, sums, r, first, row)
    return kernel.function(symbol)


def _tasks(extent: Any) -> Any:
    # A loop whose extent is not known is not simplified away.
    return parallel(extent) if isinstance(extent, int) else I.parallel(0, extent)


def _end(spec: GemmSpec, ending: Ending, blocks: int, sums: Any, r: Any, first: Any, row: Any) -> None:
    """Write one row of a task; the last block of all may have fewer than 16 channels."""
    for j in range(blocks):
        channel = bind((first + j) * OUT)
        at, to = (r * blocks + j) * OUT, (row + r) * spec.n + channel
        rest = spec.n % OUT
        if not rest or j < blocks - 1:
            ending.write(sums, at, channel, to)
            continue
        with I.If(channel + OUT <= spec.n):
            with I.Then():
                ending.write(sums, at, channel, to)
            with I.Else():
                ending.write(sums, at, channel, to, rest)

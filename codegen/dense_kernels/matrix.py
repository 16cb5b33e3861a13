"""Matrix products of row-major activations: with a packed weight, or with another activation that is packed first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from specqd.codegen.dense_kernels.epilogue import Ending
from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT, pieces
from specqd.codegen.dense_kernels.operands import Inputs, Operands, sum_type, view_type, weight_view
from specqd.codegen.dense_kernels.packing import pack_activation
from specqd.codegen.dense_kernels.product import Product, bands, locate
from specqd.codegen.dense_kernels.spec import PER_WORD, GemmSpec
from specqd.codegen.dense_kernels.tiling import Tiling, tiling
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.tiling import THREADS
from specqd.codegen.tir import I, bind, i32, tirx

__all__ = ["Matrix", "matrix_product"]


class Matrix:
    """The arguments `(x, second, [correction, [scale, [steps]]], [bias], [residual], out)` and where they lie.

    Attributes:
        operands: the weight has `blocks` blocks for each product of the batch, those of a dynamic product in
            scratch, which `pack` fills.
        rows: of each product, perhaps an expression.
    """

    def __init__(self, isa: ISA, spec: GemmSpec, size: int) -> None:
        """Open the function and declare them; the product takes `size` words of inputs at a time."""
        self.kernel, self.isa, self.spec = Kernel(isa), isa, spec
        words = pieces(spec)[0]
        self.blocks = -(-spec.n // OUT)
        m = tirx.Var("m", "int64") if spec.m is None else spec.m
        self.rows: Any = tirx.Cast("int32", m) if spec.m is None else spec.m
        lead = (spec.batch,) if spec.dynamic else ()
        x = self.kernel.argument("x", (*lead, m, spec.k), spec.dtype, view_type(spec.dtype))
        shape: tuple[int, ...] = self.blocks, words, OUT, PER_WORD[spec.dtype]
        if spec.dynamic:
            shape = (spec.batch, *((spec.n, spec.k) if spec.transposed else (spec.k, spec.n)))
        weight = self.kernel.argument("second", shape, *weight_view(spec.dtype))
        self.ending = Ending(self.kernel, isa, spec, self.blocks * OUT, (*lead, m, spec.n))
        if spec.dynamic:
            self._second = weight
            weight = self.kernel.scratch(spec.batch * self.blocks * words * OUT, "float32")
        inputs = Inputs(x, block=size, word=1, row=words, column=words)
        self.operands = Operands(spec.dtype, inputs, weight, (1, 1), words, size)
        #: threads share the rows, not the weights, where that is less to read
        self.by_band = spec.m is not None and spec.m > spec.n

    def pack(self) -> None:
        """Emit the phase that packs a dynamic second operand."""
        if self.spec.dynamic:
            with self.kernel.phase(self.spec.batch * self.blocks) as block:
                pack_activation(self.spec, self.isa, self._second, self.operands.weight, block)

    @contextmanager
    def tasks(self, parts: int, size: int, high: int) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Open a phase over parts of the channels and at most `size` rows, in tiles of `high`.

        Gives the product of the batch, the part, the first row and how many there are.
        """
        batch, rows = self.spec.batch, self.rows
        if self.spec.m is not None:
            count = -(-rows // size)
            with self.kernel.phase(batch * count * parts) as task:
                which, band, part = locate(task, count, parts, self.by_band)
                top = bind(band * size)
                yield which, part, top, bind(tirx.min(i32(size), rows - top)) if rows % size else i32(size)
            return
        # A share of the rows for each thread, because dividing tasks by an open number costs LLVM seconds.
        share = (
            tirx.truncdiv(tirx.truncdiv(rows + (THREADS - 1), i32(THREADS)) + (high - 1), i32(high)) * high
        )
        with self.kernel.phase(batch * parts * THREADS) as task:
            begin = bind(task % THREADS * share)
            end = bind(tirx.min(begin + share, rows))
            with I.serial(0, tirx.max(i32(0), tirx.truncdiv(end - begin + (size - 1), i32(size)))) as band:
                top = bind(begin + band * size)
                which, part = bind(task // (THREADS * parts)), bind(task // THREADS % parts)
                yield which, part, top, bind(tirx.min(i32(size), end - top))

    def write(self, sums: Any, at: Any, row: Any, channel: Any) -> None:
        """End the sums of a block of channels of a row; the last block of all may have fewer than 16."""
        to, rest = bind(row * self.spec.n + channel), self.spec.n % OUT
        if not rest:
            self.ending.write(sums, at, channel, to)
            return
        with I.If(channel + OUT <= self.spec.n):
            with I.Then():
                self.ending.write(sums, at, channel, to)
            with I.Else():
                self.ending.write(sums, at, channel, to, rest)


def matrix_product(spec: GemmSpec, isa: ISA, symbol: str, tiles: Tiling | None = None) -> Any:
    """Return the function."""
    made = Matrix(isa, spec, pieces(spec)[1])
    kernel = made.kernel
    tiles = tiles or tiling(isa, spec.m, 1, made.blocks, spec.batch)
    product = Product(isa, made.operands, 1, tiles)
    parts = made.blocks // tiles.blocks
    with kernel.launch():
        made.pack()
        with made.tasks(parts, tiles.task, tiles.rows) as (batch, part, top, height):
            sums = kernel.scratch(product.sums, sum_type(spec.dtype))
            first, row = bind(part * tiles.blocks), bind(batch * made.rows + top)
            product.task(
                sums,
                first + batch * made.blocks,
                bind(row * made.operands.words),
                bands(spec.m, tiles.rows, height),
            )
            with I.serial(0, height) as r:
                for j in range(tiles.blocks):
                    made.write(sums, (r * tiles.blocks + j) * OUT, row + r, bind((first + j) * OUT))
    return kernel.function(symbol)

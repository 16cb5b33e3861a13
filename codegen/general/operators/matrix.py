"""Matrix products: packed columns, a block of rows and columns in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from specqd.codegen.general.factors import Factors
from specqd.codegen.general.kernel import Kernel
from specqd.codegen.general.kernels import linear
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import combine, dtype_of
from specqd.codegen.general.reduce import meeting
from specqd.codegen.general.values import Value, const, converted, i64, position, product, zero
from specqd.codegen.tir import I, local, tirx

__all__ = ["RULES", "as_asked", "blocks", "limited", "multiply", "packed"]

aten = torch.ops.aten

#: rows of a block of the result that is held in registers
ROWS = 6
#: multiplications of a product whose speed matters less than the time that its code takes to compile
SMALL = 1 << 17


def multiply(lowering: Lowering, a: Value, b: Value, name: str = "multiply") -> Value:
    """Return the product `[batch, m, n]` of `[batch, m, k]` and `[batch, k, n]`, of one dtype.

    Columns of `b` are packed in blocks, a row of a block in one or two vectors, so that every load is of neighbours.
    """
    batch, m, k = a.shape
    n, dtype = b.shape[2], a.dtype
    shape = (batch, m, n)
    lanes = lowering.isa.lanes
    small = lowering.work(batch, m, n, k) < SMALL
    width = 2 * lanes if lowering.sizes.hint(n) > lanes and not small else lanes
    if lowering.sizes.hint(n) < lanes // 2:
        width = 1
    columns = packed(lowering, b, width)
    a = lowering.settle(a)
    most = 2 if small else ROWS
    rows = min(most, m) if isinstance(m, int) and m else most
    row_blocks, column_blocks = blocks(m, rows), blocks(n, width)

    def emit(kernel: Kernel, out: Any) -> None:
        grid = (batch, row_blocks, column_blocks)
        with kernel.tasks(product(grid), lowering.work(batch, m, n, k) // 4) as task:
            one, top, left = position(task, grid)
            sums = local(rows * width, dtype)
            _each(kernel, rows, width, lambda at, *_: I.buffer_store(sums, zero(dtype), [at]))
            with kernel.serial(k) as step:
                scalars = [I.bind(a.at([one, limited(top * rows + r, m), step])) for r in range(rows)]

                def add(at: Any, r: int, column: Any) -> None:
                    I.buffer_store(sums, sums[at] + scalars[r] * columns.at([one, left, step, column]), [at])

                _each(kernel, rows, width, add)
            _store(kernel, out, (one * m + top * rows) * n, m - top * rows, n, left, sums, dtype, rows, width)

    def nothing(kernel: Kernel, out: Any) -> None:
        I.evaluate(i64(0))

    flops = 2 * lowering.work(batch, m, n, k)
    return lowering.launch(name, [(shape, dtype)], nothing if 0 in shape else emit, flops)[0]


def blocks(size: Any, width: int) -> Any:
    """Return how many blocks of `width` a size takes."""
    return -(-size // width) if isinstance(size, int) else tirx.floordiv(size + (width - 1), i64(width))


def limited(at: Any, size: Any) -> Any:
    """Return a position, or the last one where there is none."""
    return tirx.min(at, i64(size) - 1)


def _each(kernel: Kernel, rows: int, width: int, write: Callable[..., None]) -> None:
    """Emit `write(place, row, column)` for a block in registers, a vector at a time."""
    for r in range(rows):
        _row(kernel, r, width, write)


def _row(kernel: Kernel, r: int, width: int, write: Callable[..., None]) -> None:
    lanes = min(width, kernel.isa.lanes)
    for begin in range(0, width, lanes):
        if lanes == 1:
            write(i64(r), r, i64(0))
            continue
        with kernel.vector(lanes) as lane:
            write(lane + (r * width + begin), r, lane + begin)


def _store(
    kernel: Kernel,
    out: Any,
    begin: Any,
    left: Any,
    n: Any,
    block: Any,
    sums: Any,
    dtype: str,
    rows: int,
    width: int,
) -> None:
    """Write the rows and columns of a block that there are."""

    def whole() -> None:
        def put(at: Any, r: int, column: Any) -> None:
            kernel.store(out, begin + r * n + block * width + column, sums[at])

        for r in range(rows):
            with I.If(i64(r) < left), I.Then():
                _row(kernel, r, width, put)

    if isinstance(n, int) and n % width == 0:
        whole()
        return
    with I.If((block + 1) * width <= i64(n)):
        with I.Then():
            whole()
        with I.Else():
            # Sums stay in registers only if their places are constants: a rest is written from a copy.
            rest = local(rows * width, dtype)
            _each(kernel, rows, width, lambda at, r, c: I.buffer_store(rest, sums[at], [at]))
            with I.serial(0, tirx.min(i64(rows), left)) as r, I.serial(0, i64(n) - block * width) as i:
                kernel.store(out, begin + r * n + block * width + i, rest[r * width + i])


def packed(lowering: Lowering, b: Value, width: int) -> Value:
    """Return `[batch, n / width, k, width]`; beyond `n` are numbers that mean nothing.

    To choose zero there by the column would not do: TVM takes the condition for known where it simplifies what is
    chosen, drops the limit, and then loads from beyond.
    """
    batch, k, n = b.shape
    shape = (batch, blocks(n, width), k, width)

    def at(index: Sequence[Any]) -> Any:
        one, block, step, lane = index
        return b.at([one, step, limited(block * width + lane, n)])

    value = Value(shape, b.dtype, at, cost=b.cost + 2, simd=b.simd)
    stored = lowering.stored(b, f"columns{width}", lambda array: _pack(array, width), shape)
    return stored or lowering.settle(value)


def _pack(array: np.ndarray, width: int) -> np.ndarray:
    batch, k, n = array.shape
    whole = np.zeros((batch, k, -(-n // width) * width), array.dtype)
    whole[:, :, :n] = array
    return np.ascontiguousarray(whole.reshape(batch, k, -1, width).transpose(0, 2, 1, 3))


def _computed(lowering: Lowering, *values: Value) -> list[Value]:
    """Give values in the dtype that products are computed in."""
    meet = meeting(values[0].dtype)
    return [converted(value, meet) for value in values]


def _mm(lowering: Lowering, node: fx.Node, a: Value, b: Value) -> Value:
    return as_asked(node, _product(lowering, node, *_computed(lowering, a, b)))


def as_asked(node: fx.Node, found: Value) -> Value:
    """Give what was computed in a longer float the dtype of the node; codes stay codes."""
    dtype = dtype_of(node.meta["val"].dtype)
    return converted(found, dtype) if found.dtype == meeting(dtype) else found


def _product(lowering: Lowering, node: fx.Node | None, a: Value, b: Value) -> Value:
    """Multiply matrices of one dtype; `node` is the operator that does no more than that."""
    of = Factors(a, b) if node is None else lowering.factors(node.args[0], node.args[1], 1, Factors(a, b))
    if (made := linear(lowering, node, of, None)) is not None:
        return made
    found = multiply(lowering, lowering.unsqueezed(a), lowering.unsqueezed(b))
    return lowering.reshape(found, found.shape[1:])


def _bmm(lowering: Lowering, node: fx.Node, a: Value, b: Value) -> Value:
    a, b = _computed(lowering, a, b)
    return converted(multiply(lowering, a, b), dtype_of(node.meta["val"].dtype))


def _addmm(
    lowering: Lowering, node: fx.Node, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1
) -> Value:
    a, b, bias = _computed(lowering, a, b, bias)
    of = lowering.factors(node.args[1], node.args[2], 1, Factors(a, b))
    made = linear(lowering, node, of, bias) if alpha == 1 and beta == 1 else None
    if made is not None:
        return as_asked(node, made)
    return _scaled_sum(lowering, node, _product(lowering, None, a, b), bias, alpha, beta)


def _baddbmm(
    lowering: Lowering, node: fx.Node, bias: Value, a: Value, b: Value, *, beta: Any = 1, alpha: Any = 1
) -> Value:
    return _scaled_sum(lowering, node, _bmm(lowering, node, a, b), bias, alpha, beta)


def _scaled_sum(lowering: Lowering, node: fx.Node, found: Value, bias: Value, alpha: Any, beta: Any) -> Value:
    meet = meeting(found.dtype)

    def function(k: str, x: Any, y: Any) -> Any:
        x = x if alpha == 1 else x * const(alpha, k)
        if beta == 0:
            return x
        return x + (y if beta == 1 else y * const(beta, k))

    return combine(lowering, node, function, [found, bias], {}, meet, True, 1)


RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
}

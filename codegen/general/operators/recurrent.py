"""Recurrent layers: a task computes some rows of the batch through all times, its states in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.functions import unary
from specqd.codegen.general.kernel import Kernel
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.matrix import blocks, limited, packed
from specqd.codegen.general.values import Value, i64
from specqd.codegen.tir import I, bind, f32, load, local, splat, store, tirx
from specqd.recurrent import GATES

__all__ = ["RULES"]

#: rows of the batch that share what is loaded of the matrix, and vectors of sums of all of them together
ROWS, SUMS = 4, 8

_exp, _tanh = (unary(name, "float32")[0] for name in ("exp", "tanh"))


def _recurrent(
    lowering: Lowering, node: fx.Node, kind: str, x: Value, weight: Value, bias: Value | None, hidden: Value,
    cell: Value | None, reverse: bool,
) -> tuple[Value, Value]:  # fmt: skip
    """Lower specqd::recurrent."""
    length, batch, channels = x.shape
    width = weight.shape[0]
    rows = min(ROWS, batch) if isinstance(batch, int) else ROWS
    lanes = lowering.isa.lanes * min(SUMS // rows, blocks(channels, lowering.isa.lanes))
    matrix = packed(lowering, lowering.unsqueezed(weight), lanes)
    x, hidden = lowering.ready(x), lowering.ready(hidden)
    bias, cell = (None if value is None else lowering.ready(value) for value in (bias, cell))
    flops = 2 * lowering.work(length, batch, width, channels)

    def emit(kernel: Kernel, said: Any, last: Any) -> None:
        if 0 in said.shape:
            I.evaluate(i64(0))
            return
        with kernel.tasks(blocks(batch, rows), flops) as task:
            task_rows = _Rows(kernel, kind, x, matrix, bias, bind(task * rows), rows)
            task_rows.begin(hidden, cell)
            with kernel.serial(length) as step:
                at = bind(i64(length) - 1 - step if reverse else step)
                task_rows.multiply()
                task_rows.advance(at, said)
            task_rows.end(last)

    kinds = [((length, batch, width), "float32"), ((batch, width), "float32")]
    said, last = lowering.launch("recurrent", kinds, emit, flops)
    return said, last


class _Rows:
    """Neighbouring rows of the batch; those beyond the last one compute what it does, and are not written."""

    def __init__(
        self, kernel: Kernel, kind: str, x: Value, matrix: Value, bias: Value | None, top: Any, rows: int
    ) -> None:
        self.kernel, self.kind, self.x, self.matrix, self.bias = kernel, kind, x, matrix, bias
        _, self.count, self.width, self.lanes = matrix.shape
        self.batch, self.top, self.rows, self.channels = x.shape[1], top, rows, self.count * self.lanes
        self.hidden, self.cell = (local(rows * self.width, "float32") for _ in range(2))
        self.sums = local(rows * self.channels, "float32")

    def begin(self, hidden: Value, cell: Value | None) -> None:
        """Read the states."""
        with self._row() as (r, row):
            self._each(lambda k: I.buffer_store(self.hidden, hidden.at([row, k]), [r * self.width + k]))
            if cell is not None:
                self._each(lambda k: I.buffer_store(self.cell, cell.at([row, k]), [r * self.width + k]))

    def multiply(self) -> None:
        """Multiply what was said last with the matrix: one block of columns of all rows in registers at a time."""
        vector = self.kernel.isa.lanes
        places = [(r, i) for r in range(self.rows) for i in range(self.lanes // vector)]
        with self.kernel.serial(self.count) as block:
            sums = {place: local(vector, "float32") for place in places}
            for place in places:
                store(sums[place], 0, splat(f32(0.0), vector), vector)
            with self.kernel.serial(self.width) as k:
                said = [bind(self.hidden[r * self.width + k]) for r in range(self.rows)]
                for i in range(self.lanes // vector):
                    with self.kernel.vector(vector) as lane:
                        column = bind(self.matrix.at([i64(0), block, k, lane + i * vector]))
                        for r, value in enumerate(said):
                            I.buffer_store(sums[r, i], sums[r, i][lane] + value * column, [lane])
            for r, i in places:
                at = block * self.lanes + (r * self.channels + i * vector)
                store(self.sums, at, load(sums[r, i], 0, vector), vector)

    def advance(self, time: Any, said: Any) -> None:
        """Make the next states of the products, and write what is said at `time`."""
        with self._row() as (r, row):
            self._each(lambda k: self._advance(r, row, k, time))
            self._write(r, said, time * self.batch, self.hidden)

    def end(self, last: Any) -> None:
        """Write the state that is carried on."""
        with self._row() as (r, _):
            self._write(r, last, i64(0), self.cell if self.kind == "lstm" else self.hidden)

    def _write(self, r: Any, output: Any, before: Any, state: Any) -> None:
        with I.If(self.top + r < i64(self.batch)), I.Then():
            first = (before + self.top + r) * self.width
            self._each(lambda k: self.kernel.store(output, first + k, state[r * self.width + k]))

    def _advance(self, r: Any, row: Any, k: Any, time: Any) -> None:
        gates, at = [gate * self.width for gate in range(GATES[self.kind])], r * self.width + k
        given = [bind(self.x.at([time, row, k + gate])) for gate in gates]
        product = [bind(self._product(r, k + gate)) for gate in gates]
        if self.kind == "lstm":
            enter, forget, new, leave = (a + b for a, b in zip(given, product, strict=True))
            cell = bind(_sigmoid(forget) * self.cell[at] + _sigmoid(enter) * _tanh(new))
            I.buffer_store(self.cell, cell, [at])
            hidden = _sigmoid(leave) * _tanh(cell)
        elif self.kind == "gru":
            reset, update = (_sigmoid(a + b) for a, b in zip(given[:2], product[:2], strict=True))
            new = bind(_tanh(given[2] + reset * product[2]))
            hidden = new + update * (self.hidden[at] - new)
        else:
            total = bind(given[0] + product[0])
            hidden = _tanh(total) if self.kind == "tanh" else tirx.max(total, f32(0.0))
        I.buffer_store(self.hidden, bind(hidden), [at])

    def _product(self, r: Any, channel: Any) -> Any:
        bias = f32(0.0) if self.bias is None else self.bias.at([channel])
        return self.sums[r * self.channels + channel] + bias

    def _each(self, write: Callable[[Any], None]) -> None:
        self.kernel.sweep(self.width, write)

    @contextmanager
    def _row(self) -> Iterator[tuple[Any, Any]]:
        with self.kernel.serial(self.rows) as r:
            yield r, bind(limited(self.top + r, self.batch))


def _sigmoid(x: Any) -> Any:
    return bind(f32(1.0) / (f32(1.0) + _exp(x * f32(-1.0))))


RULES: dict[Any, Callable[..., Any]] = {torch.ops.specqd.recurrent.default: _recurrent}

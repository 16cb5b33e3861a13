"""Kernel: one TIR function as it is written, and the loops that kernels are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.sym import Analyzer
from tvm.tirx.analysis import undefined_vars

from specqd.codegen.general.values import Index, Tensor, flat, i64, stored
from specqd.codegen.isa import ISA
from specqd.codegen.tir import I, tirx

__all__ = ["PARALLEL", "Kernel", "Reader"]

#: operations that are worth the launch of a parallel loop, some 8 us
PARALLEL = 1 << 16


class Reader:
    """Answers reads of tensors; what it is asked for while no kernel is written only shows what would be read."""

    def __init__(self) -> None:
        """Start without reads."""
        self.reads: list[Any] = []

    def read(self, tensor: Tensor, index: Index) -> Any:
        """Remember the position that is read; a fresh variable stands for what lies there."""
        self.reads.append(flat(index, tensor.shape))
        return tirx.Var("read", stored(tensor.dtype))


class Kernel(Reader):
    """A TIR function from tensors and sizes to tensors."""

    def __init__(self, isa: ISA, hint: Callable[[Any], int]) -> None:
        """Start without parameters; `hint` gives a size as it was in the example."""
        super().__init__()
        self.isa, self.hint = isa, hint
        self.analyzer = Analyzer()
        self.inputs: dict[Tensor, Any] = {}
        self.outputs: list[Any] = []

    def read(self, tensor: Tensor, index: Index) -> Any:
        """Load an element."""
        if tensor not in self.inputs:
            self.inputs[tensor] = _buffer(tensor.shape, tensor.dtype)
        buffer = self.inputs[tensor]
        return tirx.BufferLoad(buffer, self._place(buffer, self.simplify(flat(index, tensor.shape))))

    def output(self, shape: Sequence[Any], dtype: str) -> Any:
        """Declare a tensor that the kernel writes."""
        self.outputs.append(_buffer(shape, dtype))
        return self.outputs[-1]

    def store(self, output: Any, at: Any, expr: Any) -> None:
        """Write the element at a row-major position of an output."""
        I.buffer_store(output, expr, self._place(output, self.simplify(at)))

    def fetch(self, output: Any, at: Any) -> Any:
        """Load what was written at a row-major position of an output."""
        return tirx.BufferLoad(output, self._place(output, self.simplify(at)))

    @staticmethod
    def _place(buffer: Any, at: Any) -> list[Any]:
        # The last index may run past its dimension: memory is row-major.
        return [*[i64(0)] * (len(buffer.shape) - 1), at] if len(buffer.shape) else []

    def simplify(self, expr: Any) -> Any:
        """Simplify an index expression by what is known of the loops."""
        return self.analyzer.simplify(i64(expr))

    def function(self, body: Any, symbols: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the PrimFunc and the symbols that it takes, between its inputs and its outputs."""
        shapes = [size for buffer in [*self.inputs.values(), *self.outputs] for size in buffer.shape]
        free = undefined_vars(tirx.SeqStmt([body, *(tirx.Evaluate(i64(s)) for s in [*shapes, 0])]), [])
        used = [s for s in symbols if any(s.same_as(var) for var in free)]
        parameters = [*self.inputs.values(), *used, *self.outputs]
        return tirx.PrimFunc(parameters, body).with_attr("tirx.noalias", True), used

    # -- loops --------------------------------------------------------------------------------------------------

    @contextmanager
    def serial(self, extent: Any) -> Iterator[Any]:
        """Open a loop over `[0, extent)`."""
        if isinstance(extent, int) and extent == 1:
            yield i64(0)
            return
        with I.serial(0, i64(extent)) as var:
            self.bound(var, extent)
            yield var

    @contextmanager
    def tasks(self, extent: Any, work: int) -> Iterator[Any]:
        """Open a loop of independent iterations, shared among the threads if all of it is `work` enough."""
        if work < PARALLEL or self.hint(extent) < 2:
            with self.serial(extent) as var:
                yield var
            return
        with I.parallel(0, i64(extent)) as var:
            self.bound(var, extent)
            yield var

    @contextmanager
    def vector(self, lanes: int) -> Iterator[Any]:
        """Open a loop over the lanes of a vector."""
        with I.vectorized(0, i64(lanes)) as lane:
            self.bound(lane, lanes)
            yield lane

    def sweep(self, extent: Any, write: Callable[[Any], None], *, simd: bool = True, width: int = 0) -> None:
        """Emit `write(i)` for `[0, extent)`, in vectors where the expressions allow it, then one by one."""
        lanes = width or self.isa.lanes
        rest: Any = 0
        if simd and (not isinstance(extent, int) or extent >= lanes):
            full = extent // lanes if isinstance(extent, int) else tirx.floordiv(extent, i64(lanes))
            with self.serial(full) as block, self.vector(lanes) as lane:
                write(block * lanes + lane)
            rest = full * lanes
        if isinstance(extent, int) and isinstance(rest, int) and rest >= extent:
            return
        with self.serial(extent - rest) as i:
            write(i if isinstance(rest, int) and rest == 0 else i + rest)

    def bound(self, var: Any, extent: Any) -> None:
        """Note that `0 <= var < extent`."""
        self.analyzer.bind(
            var, tvm.ir.Range(i64(0), i64(max(extent, 1) if isinstance(extent, int) else extent))
        )


def _buffer(shape: Sequence[Any], dtype: str) -> Any:
    return tirx.decl_buffer([i64(size) for size in shape], stored(dtype))

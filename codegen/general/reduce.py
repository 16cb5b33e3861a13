"""Folding elements along dimensions: the loops of reductions, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from specqd.codegen.general import functions
from specqd.codegen.general.elementwise import groups, unfold
from specqd.codegen.general.functions import FLOATS, INTEGERS
from specqd.codegen.general.kernel import Kernel
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.values import (
    Value,
    const,
    converted,
    divide,
    flat,
    i64,
    is_nan,
    position,
    product,
    zero,
)
from specqd.codegen.tir import I, bind, local, tirx

__all__ = [
    "before",
    "dimensions",
    "extreme",
    "limit",
    "mean",
    "meeting",
    "places",
    "reduce",
    "total",
    "variance",
]

Fold = Callable[[Any, Any], Any]


def dimensions(dims: Any, rank: int) -> list[int]:
    """Return which dimensions an operator's `dim` means: all for None and for an empty list."""
    if dims is None or dims == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def reduce(lowering: Lowering, value: Value, dims: Sequence[int], start: Any, fold: Fold, name: str) -> Value:
    """Fold elements along dimensions, from `start`; the result keeps them as dimensions of one element."""
    if not value.shape:
        whole = value
        value, dims = whole.view((1,), lambda index: whole.at([])), [0]
    shape = tuple(1 if d in dims else size for d, size in enumerate(value.shape))

    def place(index: Sequence[Any]) -> Any:
        return flat([i64(0) if d in dims else i for d, i in enumerate(index)], shape)

    def emit(kernel: Kernel, out: Any) -> None:
        if 0 in shape:
            I.evaluate(i64(0))
            return
        _Reduction(lowering, kernel, value, dims, start, fold, out, place).emit()

    return lowering.launch(name, [(shape, value.dtype)], emit)[0]


class _Reduction:
    """The loops of one reduction."""

    def __init__(
        self, lowering: Lowering, kernel: Kernel, value: Value, dims: Sequence[int], start: Any, fold: Fold,
        out: Any, place: Callable[[Sequence[Any]], Any],
    ) -> None:  # fmt: skip
        self.kernel, self.value, self.start, self.fold, self.out, self.place = (
            kernel,
            value,
            start,
            fold,
            out,
            place,
        )
        found = groups(lowering, value, [place], lambda d, e: (d in dims) != (e in dims))
        self.kept = [dims_ for dims_ in found if dims_[0] not in dims]
        self.folded = [dims_ for dims_ in found if dims_[0] in dims]
        # In vectors along what is folded if that is long enough, else along the last dimension that is kept.
        last = bool(self.folded and found[-1] is self.folded[-1])
        long = last and kernel.hint(self._extents(self.folded)[-1]) >= kernel.isa.lanes
        self.along = not self.kept or long
        self.work = lowering.work(*value.shape) * (value.cost + 1)
        self.lanes = kernel.isa.lanes

    def emit(self) -> None:
        """Emit them: in vectors along what is folded, or along the last dimension that is kept."""
        kept = self._extents(self.kept)
        if 0 in self.value.shape:
            with self.kernel.tasks(product(kept), 0) as row:
                self.kernel.store(self.out, row, self.start)
        elif self.along:
            with self.kernel.tasks(product(kept), self.work) as row:
                self._row(position(row, kept))
        else:
            *outer, inner = kept
            with self.kernel.tasks(product(outer), self.work) as row:
                self._columns(position(row, outer), inner)

    def _extents(self, found: Sequence[Sequence[int]]) -> list[Any]:
        return [product([self.value.shape[d] for d in dims]) for dims in found]

    def _index(self, kept: Sequence[Any], folded: Sequence[Any]) -> list[Any]:
        return unfold([*self.kept, *self.folded], [*kept, *folded], self.value.shape)

    def _row(self, kept: Sequence[Any]) -> None:
        *outer, inner = self._extents(self.folded) or [1]
        found = self._index if self.folded else (lambda kept, folded: self._kept_only(kept))
        total = local(1, self.value.dtype)
        I.buffer_store(total, self.start, [0])
        width = self.lanes * 4 if self.kernel.hint(inner) >= 256 else self.lanes
        rest: Any = 0
        if self.value.simd and self.kernel.hint(inner) >= self.lanes:
            full = inner // width if isinstance(inner, int) else tirx.floordiv(inner, i64(width))
            rest = full * width
            sums = local(width, self.value.dtype)
            with I.vectorized(0, width) as lane:
                I.buffer_store(sums, self.start, [lane])
            kernel = self.kernel
            with (
                kernel.serial(product(outer)) as before,
                kernel.serial(full) as block,
                kernel.vector(width) as lane,
            ):
                index = found(kept, [*position(before, outer), block * width + lane])
                I.buffer_store(sums, self.fold(sums[lane], self.value.at(index)), [lane])
            # The sums stay in registers only if their places are constants: they are folded from a copy.
            copy = local(width, self.value.dtype)
            with kernel.vector(width) as lane:
                I.buffer_store(copy, sums[lane], [lane])
            with I.serial(0, width) as lane:
                I.buffer_store(total, self.fold(total[0], copy[lane]), [0])
        with self.kernel.serial(product(outer)) as before, self.kernel.serial(inner - rest) as i:
            index = found(kept, [*position(before, outer), i + rest])
            I.buffer_store(total, self.fold(total[0], self.value.at(index)), [0])
        self.kernel.store(self.out, self.place(self._kept_only(kept)), total[0])

    def _kept_only(self, kept: Sequence[Any]) -> list[Any]:
        return unfold(self.kept, kept, self.value.shape)

    def _columns(self, kept: Sequence[Any], inner: Any) -> None:
        extents = self._extents(self.folded)
        rest: Any = 0
        if self.value.simd and self.kernel.hint(inner) >= self.lanes:
            full = inner // self.lanes if isinstance(inner, int) else tirx.floordiv(inner, i64(self.lanes))
            rest = full * self.lanes
            with self.kernel.serial(full) as block:
                self._block(kept, block * self.lanes, extents, self.lanes)
        with self.kernel.serial(inner - rest) as i:
            self._block(kept, i + rest, extents, 1)

    def _block(self, kept: Sequence[Any], begin: Any, extents: Sequence[Any], width: int) -> None:
        sums = local(width, self.value.dtype)

        def each(write: Callable[[Any], None]) -> None:
            if width == 1:
                write(i64(0))
                return
            with self.kernel.vector(width) as lane:
                write(lane)

        each(lambda lane: I.buffer_store(sums, self.start, [lane]))
        with self.kernel.serial(product(extents)) as step:
            at = position(step, extents)

            def fold(lane: Any) -> None:
                index = self._index([*kept, begin + lane], at)
                I.buffer_store(sums, self.fold(sums[lane], self.value.at(index)), [lane])

            each(fold)
        each(
            lambda lane: self.kernel.store(
                self.out, self.place(self._kept_only([*kept, begin + lane])), sums[lane]
            )
        )


def total(lowering: Lowering, x: Value, dims: Sequence[int]) -> Value:
    """Sum along dimensions, which stay as dimensions of one element."""
    return reduce(lowering, x, dims, zero(x.dtype), lambda a, b: a + b, "sum")


def meeting(dtype: str) -> str:
    """Return the dtype in which elements of a dtype are summed up: float32 for shorter floats."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def mean(lowering: Lowering, x: Value, dims: Sequence[int]) -> Value:
    """Average along dimensions, which stay as dimensions of one element."""
    count = product([x.shape[d] for d in dims]) if x.shape else 1
    sums = total(lowering, x, dims)
    by = const(count, x.dtype) if isinstance(count, int) else tirx.Cast(x.dtype, count)
    return sums.view(sums.shape, lambda index: divide(sums.at(index), by), 1)


def limit(dtype: str, *, least: bool) -> Any:
    """The least or the largest value of a dtype, infinities included."""
    if dtype == "bool":
        return const(not least, dtype)
    if dtype in INTEGERS:
        info = torch.iinfo(getattr(torch, dtype))
        return const(info.min if least else info.max, dtype)
    return const(float("-inf") if least else float("inf"), dtype)


def extreme(lowering: Lowering, x: Value, dims: Sequence[int], *, largest: bool) -> Value:
    """The largest or smallest element along dimensions, NaN if one is."""
    of = functions.maximum if largest else functions.minimum
    return reduce(lowering, x, dims, limit(x.dtype, least=largest), lambda a, b: of(a, b, x.dtype), "extreme")


def places(lowering: Lowering, x: Value, dim: int, *, largest: bool) -> tuple[Value, Value]:
    """The largest (or smallest) elements along one dimension, which stays, and where they are first, int64."""
    shape = tuple(1 if d == dim else size for d, size in enumerate(x.shape))
    x = lowering.ready(x)
    rest = [size for d, size in enumerate(x.shape) if d != dim]

    def emit(kernel: Kernel, values: Any, where: Any) -> None:
        with kernel.tasks(product(rest), lowering.work(*x.shape) * 4) as row:
            at = position(row, rest)

            def element(i: Any) -> Any:
                return x.at([*at[:dim], i, *at[dim:]])

            best, first = local(1, x.dtype), local(1, "int64")
            I.buffer_store(best, element(i64(0)), [0])
            I.buffer_store(first, i64(0), [0])
            with kernel.serial(x.shape[dim] - 1) as i:
                found = bind(element(i + 1))
                better = before(found, best[0], x.dtype, largest=largest)
                with I.If(better), I.Then():
                    I.buffer_store(best, found, [0])
                    I.buffer_store(first, i + 1, [0])
            kernel.store(values, row, best[0])
            kernel.store(where, row, first[0])

    def nothing(kernel: Kernel, *_: Any) -> None:
        I.evaluate(i64(0))

    outputs = [(shape, x.dtype), (shape, "int64")]
    found, where = lowering.launch("places", outputs, nothing if 0 in shape else emit)
    return found, where


def before(a: Any, b: Any, dtype: str, *, largest: bool, nan_first: bool = True) -> Any:
    """Whether `a` comes strictly before `b`, largest or smallest first; NaN comes first, or last of all."""
    if dtype == "bool":
        return tirx.all(a, tirx.Not(b)) if largest else tirx.all(b, tirx.Not(a))
    more = (a > b) if largest else (a < b)
    if dtype not in FLOATS:
        return more
    first, second = (is_nan(x, dtype) for x in ((a, b) if nan_first else (b, a)))
    return tirx.all(tirx.Not(second), tirx.any(first, more))


def variance(lowering: Lowering, x: Value, dims: Any, correction: Any) -> tuple[Value, Value]:
    """Variance and mean along dimensions, in two passes over the data."""
    x = lowering.ready(converted(x, meeting(x.dtype)))
    dims = dimensions(dims, len(x.shape))
    middle = lowering.settle(mean(lowering, x, dims))

    def squared(index: Sequence[Any]) -> Any:
        there = [i64(0) if d in dims else i for d, i in enumerate(index)] if x.shape else [i64(0)]
        off = bind(x.at(index) - middle.at(there))
        return off * off

    sums = total(lowering, x.view(x.shape, squared, 3), dims)
    count = product([x.shape[d] for d in dims]) if x.shape else 1
    less = float(1 if correction is None else correction)
    if isinstance(count, int):
        by = const(max(count - less, 0.0), x.dtype)
    else:
        by = tirx.max(tirx.Cast(x.dtype, count) - const(less, x.dtype), zero(x.dtype))
    return sums.view(sums.shape, lambda index: divide(sums.at(index), by), 1), middle

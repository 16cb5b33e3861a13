"""Operators that write at positions which other tensors tell: element by element, in the order of the indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specqd.codegen.general import functions
from specqd.codegen.general.elementwise import write
from specqd.codegen.general.kernel import Kernel
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.indexing import checked, picked
from specqd.codegen.general.operators.joining import constant
from specqd.codegen.general.operators.pointwise import broadcast
from specqd.codegen.general.reduce import limit
from specqd.codegen.general.values import Value, const, converted, flat, i64, position, product
from specqd.codegen.tir import I, tirx
from specqd.errors import CodegenError

__all__ = ["RULES"]

aten = torch.ops.aten

Fold = Callable[[Any, Any], Any]


def scatter(
    lowering: Lowering, x: Value, source: Value, place: Callable[[Sequence[Any]], Sequence[Any]], fold: Fold | None,
    start: Any = None,
) -> Value:  # fmt: skip
    """Return `x` with each element of `source` written, or folded in, where `place` puts its index.

    With `start`, what is written to begins as that instead.
    """
    if 0 in source.shape:
        return x

    def each(kernel: Kernel, store: Callable[[Any, Any], None]) -> None:
        with kernel.serial(product(source.shape)) as i:
            index = position(i, source.shape)
            store(I.bind(flat(place(index), x.shape)), index)

    def emit(kernel: Kernel, out: Any) -> None:
        write(lowering, kernel, out, x)
        if start is not None:
            each(kernel, lambda at, index: kernel.store(out, at, start))

        def put(at: Any, index: Any) -> None:
            value = source.at(index)
            kernel.store(out, at, value if fold is None else fold(kernel.fetch(out, at), value))

        each(kernel, put)

    return lowering.launch("scatter", [(x.shape, x.dtype)], emit)[0]


def _along(lowering: Lowering, x: Value, dim: int, index: Value) -> Callable[[Sequence[Any]], Sequence[Any]]:
    where = checked(lowering, index, x.shape[dim])
    return lambda at: [*at[:dim], where.at(at), *at[dim + 1 :]]


def _scatter(fold: Callable[[str], Fold | None]) -> Callable[..., Value]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dim: int, index: Value, source: Any) -> Value:
        return _scattered(lowering, x, dim, index, source, fold(x.dtype))

    return rule


def _scattered(
    lowering: Lowering, x: Value, dim: int, index: Value, source: Any, fold: Fold | None, start: Any = None
) -> Value:
    if not isinstance(source, Value):
        source = constant(source, index.shape, x.dtype)
    shape = x.shape
    if not shape:
        x, index = (v.view((1,), lambda i, v=v: v.at([])) for v in (x, index))  # type: ignore[misc]
        scalar = source
        source = scalar.view((1,), lambda i: scalar.at([] if not scalar.shape else i))
    dim %= len(x.shape)
    # Only as much of the source is used as there are indices.
    part = converted(source, x.dtype).view(index.shape, converted(source, x.dtype).at)
    if 0 in index.shape:
        return x
    found = scatter(lowering, x, part, _along(lowering, x, dim, index), fold, start)
    return found if shape else lowering.reshape(found, ())


_FOLDS: dict[str, tuple[Callable[[str], Fold], Callable[[str], Any]]] = {
    "sum": (lambda k: lambda a, b: a + b, lambda k: const(0, k)),
    "add": (lambda k: lambda a, b: a + b, lambda k: const(0, k)),
    "prod": (lambda k: lambda a, b: a * b, lambda k: const(1, k)),
    "multiply": (lambda k: lambda a, b: a * b, lambda k: const(1, k)),
    "amax": (lambda k: lambda a, b: functions.maximum(a, b, k), lambda k: limit(k, least=True)),
    "amin": (lambda k: lambda a, b: functions.minimum(a, b, k), lambda k: limit(k, least=False)),
}


def _scatter_reduce(
    lowering: Lowering, node: fx.Node, x: Value, dim: int, index: Value, source: Value, reduce: str,
    *, include_self: bool = True,
) -> Value:  # fmt: skip
    if reduce == "mean" and x.dtype in functions.FLOATS:
        return _scatter_mean(lowering, x, dim, index, source, include_self)
    if reduce not in _FOLDS or x.dtype == "bool":
        known = "sum, prod, amax and amin of numbers can be compiled"
        raise CodegenError(f"it scatters {x.dtype} with the reduction {reduce!r}; {known}")
    fold, start = _FOLDS[reduce]
    begin = None if include_self else start(x.dtype)
    return _scattered(lowering, x, dim, index, source, fold(x.dtype), begin)


def _scatter_mean(
    lowering: Lowering, x: Value, dim: int, index: Value, source: Value, include_self: bool
) -> Value:
    fold, zero = _FOLDS["sum"][0](x.dtype), None if include_self else const(0, x.dtype)
    sums = _scattered(lowering, x, dim, index, source, fold, zero)
    ones = constant(1, x.shape, x.dtype)
    # An element that nothing is added to is divided by one, whether it counts itself or not.
    counts = _scattered(lowering, ones, dim, index, constant(1, index.shape, x.dtype), fold, zero)
    return sums.view(x.shape, lambda at: sums.at(at) / counts.at(at), 1)


def _scatter_with(
    lowering: Lowering, node: fx.Node, x: Value, dim: int, index: Value, source: Any, *, reduce: str
) -> Value:
    if x.dtype == "bool":
        raise CodegenError("it scatters bool with arithmetic")
    return _scattered(lowering, x, dim, index, source, _FOLDS[reduce][0](x.dtype))


def _index_add(
    lowering: Lowering, node: fx.Node, x: Value, dim: int, index: Value, source: Value, *, alpha: Any = 1
) -> Value:
    if alpha != 1 or not x.shape or not index.shape:
        raise CodegenError("it adds to a scalar, at a scalar position, or with a factor")
    dim %= len(x.shape)
    where = checked(lowering, index, x.shape[dim])
    return scatter(
        lowering, x, converted(source, x.dtype), lambda at: [*at[:dim], where.at([at[dim]]), *at[dim + 1 :]],
        lambda a, b: a + b,
    )  # fmt: skip


def _index_put(
    lowering: Lowering, node: fx.Node, x: Value, indices: Sequence[Value | None], values: Value,
    accumulate: bool = False, *_: Any,
) -> Value:  # fmt: skip
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    if any(index.dtype in ("bool", "uint8") for _, index in given):
        return _masked_put(lowering, node, x, given, values, accumulate)
    shape, place = picked(lowering, node, x, indices)
    source = broadcast(lowering, converted(values, x.dtype), shape)
    if x.dtype == "bool" and accumulate:
        raise CodegenError("it accumulates bool")
    return scatter(lowering, x, source, place, (lambda a, b: a + b) if accumulate else None)


def _masked_put(
    lowering: Lowering,
    node: fx.Node,
    x: Value,
    given: Sequence[tuple[int, Value]],
    values: Value,
    accumulate: bool,
) -> Value:
    (d, mask), *others = given
    if others or d != 0 or any(size != 1 for size in values.shape) or accumulate:
        raise CodegenError("how much a mask picks is only known once the data is")
    number = converted(values, x.dtype)
    rank = len(mask.shape)

    def at(index: Sequence[Any]) -> Any:
        picked = mask.at(index[:rank])
        return tirx.Select(picked, number.at([i64(0)] * len(values.shape)), x.at(index))

    return Value(x.shape, x.dtype, at, cost=x.cost + mask.cost + 1, simd=x.simd and mask.simd)


RULES: dict[Any, Callable[..., Any]] = {
    aten.scatter.src: _scatter(lambda k: None),
    aten.scatter.value: _scatter(lambda k: None),
    aten.scatter.reduce: _scatter_with,
    aten.scatter.value_reduce: _scatter_with,
    aten.scatter_add.default: _scatter(lambda k: lambda a, b: a + b),
    aten.scatter_reduce.two: _scatter_reduce,
    aten.index_add.default: _index_add,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
}

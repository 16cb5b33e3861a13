"""Scans and sorts: along one dimension, each row in order, rows in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.kernel import Kernel
from specqd.codegen.general.lowering import Lowering
from specqd.codegen.general.operators.pointwise import dtype_of
from specqd.codegen.general.reduce import before, meeting
from specqd.codegen.general.values import Value, converted, flat, i64, one, position, product, zero
from specqd.codegen.tir import I, bind, intrinsic, local, tirx

__all__ = ["RULES"]

aten = torch.ops.aten


def _rows(x: Value, dim: int) -> list[Any]:
    return [size for d, size in enumerate(x.shape) if d != dim]


def _scan(start: Callable[[str], Any], fold: Callable[[Any, Any, str], Any]) -> Callable[..., Value]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dim: int, **_: Any) -> Value:
        dtype = dtype_of(node.meta["val"].dtype)
        meet = meeting(dtype)
        x = converted(x, meet)
        if not x.shape:
            return converted(x, dtype)
        x = lowering.ready(x)
        dim %= len(x.shape)
        rest = _rows(x, dim)

        def emit(kernel: Kernel, out: Any) -> None:
            if 0 in x.shape:
                I.evaluate(i64(0))
                return
            with kernel.tasks(product(rest), lowering.work(*x.shape) * 4) as row:
                at = position(row, rest)
                so_far = local(1, meet)
                I.buffer_store(so_far, start(meet), [0])
                with kernel.serial(x.shape[dim]) as i:
                    index = [*at[:dim], i, *at[dim:]]
                    I.buffer_store(so_far, fold(so_far[0], x.at(index), meet), [0])
                    kernel.store(out, flat(index, x.shape), so_far[0])

        return converted(lowering.launch("scan", [(x.shape, meet)], emit)[0], dtype)

    return rule


def _extreme_so_far(*, largest: bool) -> Callable[..., Any]:
    def rule(lowering: Lowering, node: fx.Node, x: Value, dim: int) -> Any:
        if not x.shape:
            return x, Value((), "int64", lambda _: i64(0))
        x = lowering.ready(x)
        dim %= len(x.shape)
        rest = _rows(x, dim)

        def emit(kernel: Kernel, values: Any, where: Any) -> None:
            if 0 in x.shape:
                I.evaluate(i64(0))
                return
            with kernel.tasks(product(rest), lowering.work(*x.shape) * 4) as row:
                at = position(row, rest)
                best, place = local(1, x.dtype), local(1, "int64")
                I.buffer_store(best, x.at([*at[:dim], i64(0), *at[dim:]]), [0])
                I.buffer_store(place, i64(0), [0])
                with kernel.serial(x.shape[dim]) as i:
                    index = [*at[:dim], i, *at[dim:]]
                    found = bind(x.at(index))
                    # Of equals the last one counts.
                    with I.If(tirx.Not(before(best[0], found, x.dtype, largest=largest))), I.Then():
                        I.buffer_store(best, found, [0])
                        I.buffer_store(place, i, [0])
                    kernel.store(values, flat(index, x.shape), best[0])
                    kernel.store(where, flat(index, x.shape), place[0])

        return tuple(lowering.launch("scan", [(x.shape, x.dtype), (x.shape, "int64")], emit))

    return rule


def order(lowering: Lowering, x: Value, dim: int, *, descending: bool) -> Value:
    """Return the positions, int64, in which elements along a dimension are sorted; equals keep their order.

    NaN counts as the largest. A bottom-up merge sort: each level merges runs of one half of a buffer into the other.
    """
    rest, n = _rows(x, dim), x.shape[dim]
    levels = _bit_length(max(n - 1, 0) if isinstance(n, int) else tirx.max(n - 1, i64(0)))
    shape = (product(rest), 2, n)

    def emit(kernel: Kernel, out: Any, runs: Any) -> None:
        if 0 in x.shape:
            I.evaluate(i64(0))
            return
        with kernel.tasks(product(rest), lowering.work(*x.shape) * 16) as row:
            at = position(row, rest)
            with kernel.serial(n) as i:
                kernel.store(runs, row * 2 * n + i, i)
            with kernel.serial(levels) as level:
                begin = bind(row * 2 * n + tirx.bitwise_and(level, i64(1)) * n)
                other = bind(row * 2 * n + (i64(1) - tirx.bitwise_and(level, i64(1))) * n)
                _merge(kernel, x, at, dim, runs, begin, other, tirx.shift_left(i64(1), level), n, descending)
            last = row * 2 * n + tirx.bitwise_and(levels, i64(1)) * n
            with kernel.serial(n) as i:
                kernel.store(out, flat([*at[:dim], i, *at[dim:]], x.shape), kernel.fetch(runs, last + i))

    return lowering.launch("sort", [(x.shape, "int64"), (shape, "int64")], emit)[0]


def _bit_length(value: Any) -> Any:
    if isinstance(value, int):
        return i64(value.bit_length())
    return i64(64) - intrinsic("int64", "llvm.ctlz", value, tirx.const(False, "bool"))


def _merge(
    kernel: Kernel, x: Value, at: Sequence[Any], dim: int, runs: Any, begin: Any, other: Any, width: Any, n: Any,
    descending: bool,
) -> None:  # fmt: skip
    """Merge neighbouring runs of `width` from `begin` to `other`."""
    width = bind(width)
    with kernel.serial(tirx.floordiv(i64(n) + width * 2 - 1, width * 2)) as pair:
        low = bind(pair * width * 2)
        middle, high = bind(tirx.min(low + width, i64(n))), bind(tirx.min(low + width * 2, i64(n)))
        left, right = local(1, "int64"), local(1, "int64")
        I.buffer_store(left, low, [0])
        I.buffer_store(right, middle, [0])
        with kernel.serial(high - low) as step:
            a = bind(kernel.fetch(runs, begin + tirx.min(left[0], i64(n) - 1)))
            b = bind(kernel.fetch(runs, begin + tirx.min(right[0], i64(n) - 1)))
            first, second = (bind(x.at([*at[:dim], place, *at[dim:]])) for place in (a, b))
            sooner = before(second, first, x.dtype, largest=descending, nan_first=descending)
            takes = bind(tirx.any(left[0] >= middle, tirx.all(right[0] < high, sooner)))
            kernel.store(runs, other + low + step, tirx.Select(takes, b, a))
            ahead = bind(tirx.Select(takes, i64(1), i64(0)))
            I.buffer_store(right, right[0] + ahead, [0])
            I.buffer_store(left, left[0] + (i64(1) - ahead), [0])


def _sorted(
    lowering: Lowering, x: Value, dim: int, *, descending: bool, most: Any = None
) -> tuple[Value, Value]:
    if not x.shape:
        return x, Value((), "int64", lambda _: i64(0))
    x, dim = lowering.settle(x), dim % len(x.shape)
    where = order(lowering, x, dim, descending=descending)
    shape = [most if d == dim and most is not None else size for d, size in enumerate(x.shape)]
    values = x.view(shape, lambda i: x.at([*i[:dim], where.at(i), *i[dim + 1 :]]), 2)
    return values, where if most is None else where.view(shape, where.at)


def _sort(lowering: Lowering, node: fx.Node, x: Value, dim: int = -1, descending: bool = False) -> Any:
    return _sorted(lowering, x, dim, descending=descending)


def _stable_sort(
    lowering: Lowering,
    node: fx.Node,
    x: Value,
    *,
    stable: Any = None,
    dim: int = -1,
    descending: bool = False,
) -> Any:
    return _sorted(lowering, x, dim, descending=descending)


def _topk(
    lowering: Lowering, node: fx.Node, x: Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:  # fmt: skip
    return _sorted(lowering, x, dim, descending=largest, most=k)


RULES: dict[Any, Callable[..., Any]] = {
    aten.cumsum.default: _scan(zero, lambda a, b, k: a + b),
    aten.cumprod.default: _scan(one, lambda a, b, k: a * b),
    aten.cummax.default: _extreme_so_far(largest=True),
    aten.cummin.default: _extreme_so_far(largest=False),
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten.topk.default: _topk,
}

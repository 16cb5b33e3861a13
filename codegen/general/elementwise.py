"""The loops of an elementwise kernel: dimensions that every access sees as one become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm.sym import Analyzer, detect_linear_equation
from tvm.tirx.analysis import undefined_vars

from specqd.codegen.general.values import Value, flat, i64, position, product
from specqd.codegen.tir import I, tirx

if TYPE_CHECKING:
    from specqd.codegen.general.kernel import Kernel
    from specqd.codegen.general.lowering import Lowering

__all__ = ["groups", "unfold", "write"]

#: elements of the innermost loop that one task takes, if there are too few outer iterations to share
CHUNK = 4096
#: iterations that share themselves evenly enough among threads
TASKS = 4


def groups(
    lowering: Lowering,
    value: Value,
    places: Sequence[Any] = (),
    apart: Callable[[int, int], bool] | None = None,
) -> list[list[int]]:
    """Return runs of neighbouring dimensions that all accesses step through as through one.

    Dimensions of one element are left out. `places` are functions from an index to a position that is accessed
    beside what the value reads; `apart(d, e)` keeps two dimensions from being joined.
    """
    dims = [d for d, size in enumerate(value.shape) if not (isinstance(size, int) and size == 1)]
    variables = [tirx.Var(f"i{d}", "int64") for d in dims]
    index: list[Any] = [i64(0)] * len(value.shape)
    for d, var in zip(dims, variables, strict=True):
        index[d] = var
    statement, reads = lowering.probe(lambda: I.evaluate(value.at(index)))
    accesses = [Analyzer().simplify(i64(e)) for e in [*reads, *(place(index) for place in places)]]
    strides = [detect_linear_equation(access, variables) for access in accesses]
    pinned = [statement, *(tirx.Evaluate(a) for a, s in zip(accesses, strides, strict=True) if not s)]
    free = undefined_vars(tirx.SeqStmt([*pinned, tirx.Evaluate(i64(0))]), [])
    stuck = [any(var.same_as(other) for other in free) for var in variables]
    analyzer = Analyzer()
    found: list[list[int]] = []
    for at, d in enumerate(dims):
        if at and not (stuck[at - 1] or stuck[at] or (apart and apart(dims[at - 1], d))):
            steps = [(s[at - 1], s[at] * i64(value.shape[d])) for s in strides if s]
            if all(analyzer.can_prove_equal(outer, inner) for outer, inner in steps):
                found[-1].append(d)
                continue
        found.append([d])
    return found


def unfold(found: Sequence[Sequence[int]], positions: Sequence[Any], shape: Sequence[Any]) -> list[Any]:
    """Return the index that positions in groups of dimensions stand for."""
    index: list[Any] = [i64(0)] * len(shape)
    for dims, at in zip(found, positions, strict=True):
        for d, i in zip(dims, position(at, [shape[d] for d in dims]), strict=True):
            index[d] = i
    return index


def write(
    lowering: Lowering,
    kernel: Kernel,
    out: Any,
    value: Value,
    place: Callable[[Sequence[Any]], Any] | None = None,
) -> None:
    """Emit loops that store every element of a value, at the position that `place` gives its index."""
    place = place or (lambda index: flat(index, value.shape))
    if 0 in value.shape:
        I.evaluate(i64(0))
        return
    found = groups(lowering, value, [place])
    if not found:
        index = [i64(0)] * len(value.shape)
        kernel.store(out, place(index), value.at(index))
        return
    extents = [product([value.shape[d] for d in dims]) for dims in found]
    *outer, inner = extents
    rows = product(outer)
    pieces, size = _pieces(kernel.hint(rows), inner)
    work = lowering.work(*extents) * (value.cost + 1)
    if pieces == 1 and outer and kernel.hint(product(outer[:-1])) >= TASKS:
        with kernel.tasks(product(outer[:-1]), work) as row, kernel.serial(outer[-1]) as last:
            before = [*position(row, outer[:-1]), last]

            def put(i: Any) -> None:
                index = unfold(found, [*before, i], value.shape)
                kernel.store(out, place(index), value.at(index))

            kernel.sweep(inner, put, simd=value.simd)
        return
    with kernel.tasks(rows * pieces if pieces != 1 else rows, work) as task:
        row = task if pieces == 1 else tirx.floordiv(task, i64(pieces))
        begin = 0 if pieces == 1 else tirx.floormod(task, i64(pieces)) * size
        at = position(row, outer)

        def store(i: Any) -> None:
            index = unfold(found, [*at, i + begin if pieces != 1 else i], value.shape)
            kernel.store(out, place(index), value.at(index))

        extent = inner if pieces == 1 else tirx.min(i64(size), i64(inner) - begin)
        kernel.sweep(extent, store, simd=value.simd)


def _pieces(rows: int, inner: Any) -> tuple[Any, int]:
    if rows >= 8 or (isinstance(inner, int) and inner <= CHUNK):
        return 1, 0
    if isinstance(inner, int):
        return -(-inner // CHUNK), CHUNK
    return tirx.floordiv(inner + (CHUNK - 1), i64(CHUNK)), CHUNK

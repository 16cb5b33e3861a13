"""Value: a tensor as an index expression, so that views and elementwise work cost no memory of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm.sym import Analyzer

from specqd.codegen.tir import i32, range_of, tirx

__all__ = ["Index", "Space", "Value", "ravel", "unravel"]

Index = Sequence[Any]


class Space:
    """What is known about the loop variables in scope, for simplifying indices and proving branches."""

    def __init__(self) -> None:
        """Start knowing nothing."""
        self.analyzer = Analyzer()

    def bound(self, var: Any, extent: int) -> Any:
        """Record `0 <= var < extent` and return the variable."""
        self.analyzer.bind(var, range_of(extent))
        return var

    def simplify(self, expr: Any) -> Any:
        """Simplify an index expression; ints pass through."""
        return expr if isinstance(expr, int) else self.analyzer.simplify(expr)

    def proves(self, condition: Any) -> bool:
        """Say whether the condition holds for every value of the variables."""
        return bool(condition) if isinstance(condition, bool) else self.analyzer.can_prove(condition)


@dataclass(frozen=True)
class Value:
    """A tensor of static `shape`; `at(index)` gives the TIR expression of one element.

    `buffer` is set when the value is exactly that buffer in row-major order from element `offset`. `breaks` are
    positions of the last dimension where the expression changes form; between them it is free of branches.
    `vectorises` is False when it holds calls that only exist one at a time (libm, gathers).
    """

    shape: tuple[int, ...]
    dtype: str
    at: Callable[[Index], Any]
    buffer: Any = None
    offset: Any = 0
    breaks: frozenset[int] = frozenset()
    vectorises: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def with_at(self, shape: Sequence[int], at: Callable[[Index], Any], **changes: Any) -> Value:
        """Derive a value that is no longer a plain buffer."""
        return replace(self, shape=tuple(shape), at=at, buffer=changes.pop("buffer", None), **changes)


def of_buffer(space: Space, buffer: Any, shape: Sequence[int], dtype: str, offset: Any = 0) -> Value:
    """Make the value that reads `buffer` in row-major order."""
    shape = tuple(shape)

    def at(index: Index) -> Any:
        return buffer[space.simplify(ravel(index, shape) + offset)]

    return Value(shape, dtype, at, buffer, offset)


def constant(value: Any, dtype: str, shape: Sequence[int] = ()) -> Value:
    """Make a value that is the same everywhere."""
    return Value(tuple(shape), dtype, lambda _: tirx.const(value, dtype))


def ravel(index: Index, shape: Sequence[int]) -> Any:
    """Row-major position of an index."""
    flat: Any = 0
    for i, extent in zip(index, shape, strict=True):
        flat = flat * extent + (0 if extent == 1 else i)
    return i32(flat) if isinstance(flat, int) else flat


def unravel(flat: Any, shape: Sequence[int], space: Space) -> list[Any]:
    """Index whose row-major position is `flat`, which lies within the shape."""
    index: list[Any] = [i32(0)] * len(shape)
    dims = [d for d, extent in enumerate(shape) if extent > 1]
    for d in reversed(dims):
        if d == dims[0]:
            index[d] = flat
            break
        index[d] = space.simplify(tirx.floormod(flat, i32(shape[d])))
        flat = space.simplify(tirx.floordiv(flat, i32(shape[d])))
    return index

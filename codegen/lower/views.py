"""Views: operators that only rename indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from specqd.codegen.lower.values import Index, Space, Value, ravel, unravel
from specqd.codegen.tir import i32, tirx

__all__ = ["broadcast", "concatenate", "permute", "reshape", "select", "slice_"]


def reshape(space: Space, value: Value, shape: Sequence[int]) -> Value:
    """Read the same elements in row-major order under another shape."""
    shape = tuple(shape)
    if shape == value.shape:
        return value
    # Dimensions of extent one come and go freely; only a real regrouping needs division.
    if [s for s in shape if s != 1] == [s for s in value.shape if s != 1]:
        kept = [i for i, s in enumerate(shape) if s != 1]

        def squeeze(index: Index) -> object:
            rest = iter(index[i] for i in kept)
            return value.at([i32(0) if s == 1 else next(rest) for s in value.shape])

        same_last = bool(shape) and bool(value.shape) and shape[-1] == value.shape[-1]
        return replace(value, shape=shape, at=squeeze, breaks=value.breaks if same_last else frozenset())

    def at(index: Index) -> object:
        return value.at(unravel(space.simplify(ravel(index, shape)), value.shape, space))

    breaks: frozenset[int] = frozenset()
    if shape and value.shape and shape[-1] == value.shape[-1]:
        breaks = value.breaks
    elif shape and value.shape and shape[-1] % value.shape[-1] == 0:
        # Merging trailing dimensions repeats the source's breaks in every period.
        period = value.shape[-1]
        marks = {0, *value.breaks} if value.breaks else set()
        breaks = frozenset(p + m for p in range(0, shape[-1], period) for m in marks if p + m)
        if len(breaks) > 64:
            return replace(value, shape=shape, at=at, breaks=frozenset(), vectorises=False)
    elif value.breaks:
        return replace(value, shape=shape, at=at, breaks=frozenset(), vectorises=False)
    return replace(value, shape=shape, at=at, breaks=breaks)


def permute(value: Value, order: Sequence[int]) -> Value:
    """Reorder dimensions: result dimension `i` is source dimension `order[i]`."""
    order = [d % len(value.shape) for d in order]
    shape = [value.shape[d] for d in order]
    moved = [d for d in order if value.shape[d] != 1]

    def at(index: Index) -> object:
        source: list[object] = [None] * len(order)
        for i, d in enumerate(order):
            source[d] = index[i]
        return value.at(source)

    if moved == sorted(moved):
        return replace(value, shape=tuple(shape), at=at)
    keeps_last = order[-1] == len(order) - 1
    return value.with_at(
        shape,
        at,
        breaks=value.breaks if keeps_last else frozenset(),
        vectorises=value.vectorises and keeps_last,
    )


def broadcast(value: Value, shape: Sequence[int]) -> Value:
    """Repeat dimensions of extent one (and missing leading ones) up to `shape`."""
    shape = tuple(shape)
    if shape == value.shape:
        return value
    lead = len(shape) - len(value.shape)

    def at(index: Index) -> object:
        return value.at([i32(0) if s == 1 else i for i, s in zip(index[lead:], value.shape, strict=True)])

    plain = prod(shape) == value.size
    keeps = bool(value.shape) and value.shape[-1] == shape[-1]
    breaks = value.breaks if keeps else frozenset()
    return replace(value, shape=shape, at=at, breaks=breaks, buffer=value.buffer if plain else None)


def slice_(space: Space, value: Value, dim: int, start: int, length: int, step: int = 1) -> Value:
    """Take `length` elements from `start`, every `step`-th, along `dim`."""
    dim %= len(value.shape)
    if start == 0 and length == value.shape[dim]:
        return value
    shape = [*value.shape[:dim], length, *value.shape[dim + 1 :]]

    def at(index: Index) -> object:
        return value.at([space.simplify(i * step + start) if d == dim else i for d, i in enumerate(index)])

    if dim != len(shape) - 1:
        flat = all(s == 1 for s in value.shape[:dim]) and step == 1 and value.buffer is not None
        offset = value.offset + start * prod(value.shape[dim + 1 :]) if flat else value.offset
        return replace(value, shape=tuple(shape), at=at, buffer=value.buffer if flat else None, offset=offset)
    breaks = frozenset(b - start for b in value.breaks if start < b < start + length)
    flat = all(s == 1 for s in value.shape[:-1]) and step == 1 and value.buffer is not None
    return replace(
        value,
        shape=tuple(shape),
        at=at,
        breaks=breaks if step == 1 else frozenset(),
        buffer=value.buffer if flat else None,
        offset=value.offset + start if flat else value.offset,
        vectorises=value.vectorises and (step == 1),
    )


def select(space: Space, value: Value, dim: int, index: int) -> Value:
    """Drop dimension `dim` at one position."""
    dim %= len(value.shape)
    taken = slice_(space, value, dim, index % value.shape[dim], 1)
    return reshape(space, taken, [*value.shape[:dim], *value.shape[dim + 1 :]])


def concatenate(space: Space, parts: Sequence[Value], dim: int) -> Value:
    """Join values along `dim`; branches are decided from the loop ranges where they can be."""
    dim %= len(parts[0].shape)
    ends = [sum(p.shape[dim] for p in parts[: i + 1]) for i in range(len(parts))]
    starts = [0, *ends[:-1]]
    shape = [*parts[0].shape[:dim], ends[-1], *parts[0].shape[dim + 1 :]]
    last = dim == len(shape) - 1

    def part_at(i: int, index: Index, clamp: bool) -> object:
        where = index[dim] - starts[i]
        if clamp:
            where = tirx.max(tirx.min(where, i32(parts[i].shape[dim] - 1)), i32(0))
        return parts[i].at([*index[:dim], space.simplify(where), *index[dim + 1 :]])

    def at(index: Index) -> object:
        where = index[dim]
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if space.proves(tirx.all(where >= start, where < end)):
                return part_at(i, index, clamp=False)
        result = part_at(len(parts) - 1, index, clamp=True)
        for i in reversed(range(len(parts) - 1)):
            result = tirx.Select(where < ends[i], part_at(i, index, clamp=True), result)
        return result

    inner = [b + s for p, s in zip(parts, starts, strict=True) for b in p.breaks] if last else []
    shared = frozenset() if last else frozenset().union(*(p.breaks for p in parts))
    breaks = frozenset([*inner, *ends[:-1]]) if last else shared
    vectorises = all(p.vectorises for p in parts)
    return Value(tuple(shape), parts[0].dtype, at, breaks=breaks, vectorises=vectorises)

"""The best groups of channels of a row: find them in a preview, compute them again from the exact weights."""

from __future__ import annotations

from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.dense import BLOCK, tile
from specqd.codegen.tir import I, bind, f32, i32, load, local, parallel, tirx

__all__ = ["refine", "scratch_sizes"]

_LEAST = -3.4e38
#: blocks of channels whose maxima are searched as one
_SECTION = 64


def refine(
    isa: ISA,
    rows: int,
    n: int,
    k: int,
    best: int,
    preview: Any,
    x: Any,
    weight: tuple[Any, Any],
    kind: str,
    scratch: tuple[Any, Any, Any],
    finish: Any,
    phase: Any,
) -> None:
    """Emit three phases: the maximum of each block of `preview` float32 `[rows, n]`; the `best` blocks; their values.

    `x`, `weight` (with the offset of its first element) and `kind` are as in `dense`, whose `finish` gets the new
    values. `scratch` is what `scratch_sizes` says: maxima and tops float32, chosen int32.
    """
    maxima, tops, chosen = scratch
    sections = _sections(n)
    blocks = sections * _SECTION
    with phase(), parallel(rows * sections) as u:
        row, section = u // sections, u % sections
        I.buffer_store(tops, f32(_LEAST), [u])
        with I.serial(0, _SECTION) as i:
            _maximum(isa, n, preview, row, bind(section * _SECTION + i), maxima, row * blocks)
            at = bind(row * blocks + section * _SECTION + i)
            I.buffer_store(tops, tirx.max(tops[u], maxima[at]), [u])
    with phase(), parallel(rows) as row, I.serial(0, best) as i:
        section = _first_largest(tops, row * sections, sections)
        block = _first_largest(maxima, row * blocks + section * _SECTION, _SECTION)
        I.buffer_store(chosen, section * _SECTION + block, [row * best + i])
        I.buffer_store(maxima, f32(_LEAST), [row * blocks + section * _SECTION + block])
        I.buffer_store(tops, f32(_LEAST), [row * sections + section])
        with I.serial(0, _SECTION) as j:
            other = maxima[row * blocks + section * _SECTION + j]
            I.buffer_store(tops, tirx.max(tops[row * sections + section], other), [row * sections + section])
    steps = k // 2 if kind == "bf16" else k
    with phase(), parallel(rows * best) as u:
        block = bind(chosen[u])
        tile(
            isa, kind, steps, block, 1, u // best, 1, x, *weight, finish, lambda _, step: block * steps + step
        )


def scratch_sizes(n: int, best: int) -> tuple[tuple[str, int], ...]:
    """Dtype and elements a row of what `refine` needs."""
    sections = _sections(n)
    return ("float32", sections * _SECTION), ("float32", sections), ("int32", best)


def _sections(n: int) -> int:
    return -(-n // (BLOCK * _SECTION))


def _maximum(isa: ISA, n: int, preview: Any, row: Any, block: Any, maxima: Any, base: Any) -> None:
    """Store the largest of the channels of one block, of which the last may be short or beyond the end."""
    lanes, at = isa.lanes, base + block
    I.buffer_store(maxima, f32(_LEAST), [at])
    with I.If((block + 1) * BLOCK <= n):
        with I.Then():
            for v in range(BLOCK // lanes):
                part = isa.reduce("fmax", load(preview, row * n + block * BLOCK + v * lanes, lanes))
                I.buffer_store(maxima, tirx.max(maxima[at], part), [at])
        with I.Else(), I.serial(0, tirx.max(i32(0), n - block * BLOCK)) as i:
            I.buffer_store(maxima, tirx.max(maxima[at], preview[row * n + block * BLOCK + i]), [at])


def _first_largest(values: Any, base: Any, size: int) -> Any:
    """Return the index, from `base` on, of the first of the largest of `size` values."""
    top, where = local(1, "float32"), local(1, "int32")
    I.buffer_store(top, values[base], [0])
    I.buffer_store(where, i32(0), [0])
    with I.serial(1, size) as i, I.If(values[base + i] > top[0]), I.Then():
        I.buffer_store(top, values[base + i], [0])
        I.buffer_store(where, i, [0])
    return bind(where[0])

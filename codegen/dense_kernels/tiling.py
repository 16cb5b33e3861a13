"""How a product is cut: accumulators in registers, pixels and channels a task, inputs a pass; and how it could be."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from specqd.codegen.dense_kernels.layout import OUT
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.tiling import THREADS

__all__ = ["Tiling", "passes", "tiling", "tilings"]

#: pixels of a task, whose sums wait in the first cache between passes over parts of the inputs
_PIXELS = 112
#: words of weights that a pass reads for each block of output channels
_WORDS = 160
#: what else is tried of these two
_TRIED_PIXELS, _TRIED_WORDS = (28, 56, 112, 224, 448), (80, 160, 320, 640)
#: where the number of rows is open: tiles of a task, and rows of a tile, which is generated in powers of two as well
_OPEN, _LARGEST_OPEN = 4, 14


@dataclass(frozen=True)
class Tiling:
    """`blocks` of 16 channels times `rows` x `columns` pixels in registers; `task` rows a task, `words` a pass."""

    blocks: int
    rows: int
    columns: int
    task: int
    words: int = _WORDS


def tiling(isa: ISA, rows: int | None, columns: int, blocks: int, products: int = 1) -> Tiling:
    """Choose for `rows` (None: open) x `columns` pixels and `blocks` of 16 channels that share inputs.

    `products` are as many as there are of these, each a task or more.
    """
    vectors = OUT // isa.lanes
    fits = []
    for width in (w for w in range(1, 9) if blocks % w == 0):
        limit = max(1, (isa.registers - 1) // (width * vectors) - 1)
        limit = min(limit, _LARGEST_OPEN) if rows is None else limit
        tile = _tile(rows, columns, limit)
        fits.append((_cost(rows, columns, tile, width * vectors), -width, (width, *tile)))
    width, high, wide = min(fits)[2]
    return Tiling(width, high, wide, _task(rows, columns, high, blocks // width * products))


def tilings(isa: ISA, rows: int, columns: int, blocks: int, products: int = 1) -> list[Tiling]:
    """Return what `tiling` chooses, then what else fits the registers, by how it should do."""
    vectors, found = OUT // isa.lanes, dict[Tiling, float]()
    for width in (w for w in range(1, 9) if blocks % w == 0):
        limit = max(1, (isa.registers - 1) // (width * vectors) - 1)
        least = -(-columns // limit)
        for wide in {-(-columns // cuts) for cuts in range(least, least + 3)}:
            most = min(limit // columns, rows) if wide == columns else 1
            for high in {most, -(-most // 2), 1}:
                cost = _cost(rows, columns, (high, wide), width * vectors)
                whole = -(-rows // high) * high
                tasks = {min(whole, max(1, round(p / (columns * high))) * high) for p in _TRIED_PIXELS}
                found |= {Tiling(width, high, wide, t, w): cost for t in tasks for w in _TRIED_WORDS}
    first = tiling(isa, rows, columns, blocks, products)
    return [
        first,
        *sorted(found.keys() - {first}, key=lambda t: (found[t], abs(t.task * columns - _PIXELS), t.words)),
    ]


def _tile(rows: int | None, columns: int, limit: int) -> tuple[int, int]:
    """Cut columns evenly; rows that fit whole are taken several at a time."""
    wide = -(-columns // -(-columns // limit))
    high = limit // columns if wide == columns else 1
    return max(1, min(high, rows or high)), wide


def _cost(rows: int | None, columns: int, tile: tuple[int, int], vectors: int) -> float:
    """Cycles for each vector of outputs and input word: FMAs and loads go two a cycle, an FMA takes four."""
    rows = rows or 16 * tile[0]
    cycles = 0.0
    for high, wide in product(_cuts(rows, tile[0]), _cuts(columns, tile[1])):
        pixels = high[0] * wide[0]
        each = max(vectors * pixels / 2, (vectors + pixels) / 2, 4)
        # Weights of a tile come from the second cache, and are used for few pixels or many.
        cycles += (each + vectors / 4) * high[1] * wide[1]
    return cycles / (rows * columns * vectors)


def _cuts(size: int, piece: int) -> list[tuple[int, int]]:
    return [(p, n) for p, n in ((piece, size // piece), (size % piece, 1)) if p and n]


def _task(rows: int | None, columns: int, high: int, others: int) -> int:
    """Rows of a task: as many as its pixels allow, such that threads get equal shares."""
    if rows is None:
        return high * _OPEN
    choices = []
    for task in range(high, rows + high, high):
        if task > high and task * columns > _PIXELS * 1.5:
            break
        count = -(-rows // task)
        full = -(-count * others // THREADS) * THREADS * task
        idle = round(full / (rows * others), 1) if count * others < 16 else 1.0
        choices.append((idle, abs(task * columns - _PIXELS), task))
    return min(choices)[2]


def passes(blocks: int, taps: int, words: int, most: int) -> int:
    """Return how many of `blocks` of inputs a pass takes: a divisor, of at most so many words if it is not one."""
    return next(n for n in range(blocks, 0, -1) if blocks % n == 0 and (n == 1 or n * taps * words <= most))

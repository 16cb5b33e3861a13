"""What a pass costs on this machine: by entry, rows and position, and by what ran before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from specqd.runtime.engine import Engine

__all__ = ["PassCosts", "measure"]

Tell = Callable[[int, int], None]

_USUAL = 16  # rows of the passes that matter most; larger ones, which fill caches, are timed less often


@dataclass(frozen=True)
class PassCosts:
    """Seconds in compiled code of each kind of pass at two positions, between and beyond which they lie on a line.

    `checking[entry]` are the row counts, ascending, of the passes that output each row and so can check drafts; larger
    passes only fill the caches. `seconds[entry, rows, again]` is a pair, a time for each position; `again`: the pass
    before was the entry's own too, so that the processor's caches may still hold its weights. `overhead`: seconds
    outside compiled code that a pass brings with it.
    """

    positions: tuple[int, int]
    checking: dict[str, tuple[int, ...]]
    seconds: dict[tuple[str, int, bool], tuple[float, float]]
    overhead: float

    def rows(self, entry: str) -> list[int]:
        """Row counts of all passes, ascending."""
        return sorted(rows for name, rows, again in self.seconds if name == entry and again)

    def of(self, entry: str, rows: int, at: int, again: bool) -> float:
        """Seconds of a pass of `rows` from position `at`, with more rows if there is none of just so many."""
        if (entry, rows, again) not in self.seconds:
            rows = next(size for size in self.checking[entry] if size >= rows)
        key = entry, rows, again
        low, high = self.seconds[key]
        begin, end = self.positions
        return low + (high - low) * (at - begin) / (end - begin) + self.overhead


def measure(
    engine: Engine,
    entries: Sequence[str],
    positions: tuple[int, int],
    overhead: float,
    repeats: int,
    tell: Tell,
) -> PassCosts:
    """Time all passes of `entries` in turns, each once after another entry's pass and once more after its own."""
    taken: dict[tuple[str, int, bool], list[list[float]]] = defaultdict(lambda: [[], []])
    sizes = sorted({rows for entry in entries for rows in engine.rows(entry)})
    for repeat in range(repeats):
        tell(repeat, repeats)
        for place, at in enumerate(positions):
            for rows in sizes if repeat % 4 == 0 else [size for size in sizes if size <= _USUAL]:
                for entry in entries:
                    start = min(at, engine.manifest.level(entry).capacity - rows)
                    if rows in engine.rows(entry) and start >= 0:
                        for again in (False, True):
                            taken[entry, rows, again][place].append(_time(engine, entry, rows, start))
    seconds = {key: (median(low), median(high)) for key, (low, high) in taken.items()}
    checking = {entry: engine.rows(entry, every_row=True) for entry in entries}
    return PassCosts(positions, checking, seconds, overhead)


def _time(engine: Engine, entry: str, rows: int, at: int) -> float:
    before = engine.seconds
    engine.step(entry, [1] * rows, at)
    return engine.seconds - before

"""What a pass costs on this machine: by entry, rows and position, and by what ran before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from specqd.runtime.engine import Engine

__all__ = ["PassCosts", "Stopwatch"]

_USUAL = 16  # rows of the passes that matter most
_RARELY = 4  # one sample of so many has the larger ones too, which fill caches


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


class Stopwatch:
    """Times all passes of some entries, in turns, whenever asked to: a machine's speed changes within minutes.

    `overhead`: seconds outside compiled code that a pass brings with it.
    """

    def __init__(
        self, engine: Engine, entries: Sequence[str], positions: tuple[int, int], overhead: float
    ) -> None:
        self._engine, self._entries = engine, entries
        self._positions, self._overhead = positions, overhead
        self._sizes = sorted({rows for entry in entries for rows in engine.rows(entry)})
        self.restart()

    def restart(self) -> None:
        """Forget what was timed so far."""
        self._samples = 0
        self._taken: dict[tuple[str, int, bool], list[list[float]]] = defaultdict(lambda: [[], []])

    def sample(self, times: int = 1) -> None:
        """Time each pass at both positions, once after another entry's pass and once more after its own."""
        for _ in range(times):
            sizes = self._sizes if self._samples % _RARELY == 0 else [n for n in self._sizes if n <= _USUAL]
            self._samples += 1
            for place, at in enumerate(self._positions):
                for rows in sizes:
                    for entry in self._entries:
                        self._time(entry, rows, at, place)

    def costs(self) -> PassCosts:
        """Return the medians of all samples since the last restart."""
        seconds = {key: (median(low), median(high)) for key, (low, high) in self._taken.items()}
        checking = {entry: self._engine.rows(entry, every_row=True) for entry in self._entries}
        return PassCosts(self._positions, checking, seconds, self._overhead)

    def _time(self, entry: str, rows: int, at: int, place: int) -> None:
        engine = self._engine
        start = min(at, engine.manifest.level(entry).capacity - rows)
        if rows not in engine.rows(entry) or start < 0:
            return
        for again in (False, True):
            before = engine.seconds
            engine.recent.forget(0)
            engine.step(entry, [1] * rows, start)
            self._taken[entry, rows, again][place].append(engine.seconds - before)

"""The stage on which plans are played: it stands in for the engine, says what was recorded, and keeps its own time."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import count
from typing import TypeVar

import numpy as np

from specqd.planning.costs import PassCosts
from specqd.planning.recording import Recording
from specqd.runtime.asking import Pass, Steps
from specqd.runtime.levels import Verifier
from specqd.runtime.output import Output

__all__ = ["Stage"]

T = TypeVar("T")
Said = tuple[int, tuple[float, float]]
"""A token, its probability and the entropy (nats) of the distribution it is from."""

_SURE = (1.0, 0.0)


class Stage:
    """What an engine and a place are to levels, for one answer of a recording; `seconds` adds up measured passes.

    A draft that goes on from the recording's text says what was recorded there. Off the text nobody knows what it
    would say. Then it agrees with the level that asks it for as long as both do at the same place of the recording,
    and after that says what nobody else does.
    """

    def __init__(self, recording: Recording, costs: PassCosts, caches: Mapping[str, frozenset[str]]) -> None:
        self.entries = tuple(caches)
        self.seconds = 0.0
        self._caches = caches
        self._recording, self._costs = recording, costs
        self._ran = ""  # the entry of the latest pass
        self._texts: dict[str, list[int]] = {}  # what was fed, by entry; levels that share a cache share it
        self._drafts: dict[str, tuple[Verifier, Verifier]] = {}  # each with the level that asks it
        self._strange = count(-1, -1)

    def enter(self, level: Verifier) -> None:
        """Take note of a level and those below it."""
        self._texts.setdefault(level.entry, [])
        for source in level.below:
            if isinstance(below := source.level, Verifier):
                self._drafts[below.entry] = below, level
                if below.shares:
                    self._texts[below.entry] = self._texts[level.entry]
                self.enter(below)

    def fill(self, entry: str, text: list[int]) -> None:
        """Let the caches of an entry hold a text."""
        self._texts[entry][:] = text

    def spent(self) -> float:
        """Seconds of all passes so far."""
        return self.seconds

    def share(self) -> int:
        """More rows than any pass has."""
        return sys.maxsize

    def caches(self, entry: str) -> frozenset[str]:
        """Names of the caches that an entry uses."""
        return self._caches[entry]

    def rows(self, entry: str, *, every_row: bool = False) -> tuple[int, ...]:
        """Row counts of an entry's passes, ascending; `every_row`: of those that can check drafts."""
        return self._costs.checking[entry] if every_row else tuple(self._costs.rows(entry))

    def room(self, entry: str, start: int) -> int:
        """Most rows of a pass that can check drafts: no recording reaches the end of the cache."""
        return self._costs.checking[entry][-1]

    def schedule(self) -> None:
        """Select nothing: what is played is too short for it."""

    def drive(self, steps: Steps[T]) -> T:
        """Do the work of a level, as specqd.runtime.asking.run does on an engine."""
        try:
            wanted = next(steps)
            while True:
                wanted = steps.send(self._run(wanted))
        except StopIteration as end:
            return end.value

    def _run(self, wanted: Pass) -> Output:
        entry, rows = wanted.entry, len(wanted.tokens)
        self.seconds += self._costs.of(entry, rows, wanted.start, again=self._ran == entry)
        self._ran = entry
        text = self._texts[entry]
        text[wanted.start :] = wanted.tokens
        checks = rows <= self._costs.checking[entry][-1]
        said = [
            self._say(entry, text[: wanted.start + i + 1]) for i in range(0 if checks else rows - 1, rows)
        ]
        sums = [(1 / p, (entropy + math.log(p)) / p) for _, (p, entropy) in said]
        return Output(np.array([token for token, _ in said]), None, np.array(sums), sys.maxsize)

    def _say(self, entry: str, text: list[int]) -> Said:
        """What an entry says after a text."""
        recorded = self._recording.text
        if entry not in self._drafts:
            known = len(text) < len(recorded) and tuple(text) == recorded[: len(text)]
            return (recorded[len(text)], _SURE) if known else (next(self._strange), _SURE)
        level, asker = self._drafts[entry]
        if len(text) < level.began:
            return next(self._strange), _SURE  # of a row that only fills the cache
        place = min(level.began, len(recorded) - 1)
        run, done = self._recording.runs[entry][place], len(text) - level.began
        doubt = run.doubts[min(done, len(run.doubts) - 1)]
        if level.began == place and tuple(text[:place]) == recorded[:place]:
            if done < len(run.tokens) and tuple(text[place:]) == run.tokens[:done]:
                return run.tokens[done], doubt
        elif done < self._agreeing(entry, asker.entry, place):
            return self._say(asker.entry, text)[0], doubt
        return next(self._strange), doubt

    def _agreeing(self, entry: str, other: str, place: int) -> int:
        """Tokens that two drafts agree on after a place of the recording."""
        own, others = (self._recording.runs[name][place].tokens for name in (entry, other))
        return next((i for i, (a, b) in enumerate(zip(own, others, strict=False)) if a != b), len(own))

"""What passes between levels, and between them and whoever drives them: what is asked, and what comes of it.

Levels run nothing: they yield the passes that they need and are sent what came of them (`Steps`). So whoever drives
them may put the passes of several sequences into one (specqd.runtime.batch).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from specqd.runtime.choosing import Choice
from specqd.runtime.engine import Engine
from specqd.runtime.output import Output
from specqd.runtime.selecting import Schedule

__all__ = ["Alone", "Asked", "Entries", "Level", "LevelStats", "Pass", "Place", "Round", "Steps", "run"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pass:
    """Tokens that an entry is to be fed, at positions `start`, `start + 1`, ... of the sequence."""

    entry: str
    tokens: Sequence[int]
    start: int


Steps = Generator[Pass, Output, T]
"""Work that asks for passes and ends in a T."""


def run(engine: Engine, steps: Steps[T], sequence: int = 0) -> T:
    """Do the work of one sequence, a pass at a time."""
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(engine.feed(wanted.entry, wanted.tokens, wanted.start, sequence))
    except StopIteration as end:
        return end.value


@dataclass
class LevelStats:
    """What one level did; filled in while it runs.

    `proposed` tokens reached the level above, which decided on `examined` of them and chose `accepted` too; what
    follows a rejected token is dropped unseen. `passes` and `seconds` are its own (those of levels below aside).
    """

    name: str
    proposed: int = 0
    examined: int = 0
    accepted: int = 0
    passes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Asked:
    """What a level wants of the one below it.

    About `want` and at most `most` tokens; after each pass below, `goes_on(tokens so far, probability of the last
    row's greedy choice, its entropy)` says whether to continue. `held`: positions of the text whose keys and values
    the asking level has in its cache.
    """

    want: int
    most: int
    held: int
    goes_on: Callable[[int, float, float], bool]


@dataclass(frozen=True)
class Round:
    """One verification: what was proposed by which level to which, and how many of the tokens stood."""

    level: str
    below: str
    drafts: tuple[int, ...]
    new: tuple[int, ...]


class Entries(Protocol):
    """What levels know of an engine: what it has compiled, and what that takes; see Engine, which is one."""

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the compiled entries."""
        ...

    def caches(self, entry: str) -> frozenset[str]:
        """Names of the caches that an entry uses."""
        ...

    def rows(self, entry: str, *, every_row: bool = False) -> tuple[int, ...]:
        """Row counts of an entry's passes, ascending; `every_row`: of those that output each row."""
        ...

    def room(self, entry: str, start: int) -> int:
        """Most rows of a pass from position `start` that outputs each; 0 at the cache's end."""
        ...

    def schedule(self) -> Schedule | None:
        """When to select positions of a new text; None if that is never done."""
        ...


class Place(Protocol):
    """Where a sequence is decoded."""

    def spent(self) -> float:
        """Seconds that were spent on the sequence, counted from any moment."""
        ...

    def share(self) -> int:
        """Most rows of a pass that are the sequence's own, 1 or more."""
        ...


class Alone:
    """The place of a sequence that has every pass for itself."""

    def spent(self) -> float:
        """Return the time."""
        return time.perf_counter()

    def share(self) -> int:
        """Return more than any pass has."""
        return sys.maxsize


class Level(Protocol):
    """Something that proposes how a text goes on."""

    @property
    def stats(self) -> LevelStats:
        """Its figures."""
        ...

    def propose(self, text: list[int], asked: Asked) -> Steps[list[Choice]]:
        """Propose tokens after `text`, which is left as it was; none if there is nothing to propose."""
        ...

    def keep(self, length: int) -> None:
        """Forget what was seen of the text from index `length` on: it may go on otherwise."""
        ...

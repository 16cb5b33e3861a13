"""The levels of specqd.runtime.levels, played: they say what was recorded and cost what was measured.

The draft-length rules and the search are the runtime's own. The classes mirror Looked and Verifier step by step;
tests/test_planning_simulation.py holds the rounds of both against each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specqd.planning.costs import PassCosts
from specqd.planning.recording import DEPTH, Recording, Run
from specqd.runtime.drafting import DraftLength
from specqd.runtime.lookup import SuffixLookup
from specqd.runtime.plan import Link

__all__ = ["Compiled", "Played", "Round", "Scene", "Searched", "Source"]

_MEMORY = 0.97  # weight of a round in a level's pace after each further one, as in specqd.runtime.levels
_USUAL = 3  # tokens that must recur in a search that does not say, as in specqd.runtime.plan


@dataclass(frozen=True)
class Round:
    """One pass of `level` after `below` had drafted for it: tokens drafted, and how many of them stood."""

    level: str
    below: str
    drafted: int
    agreed: int


@dataclass
class Played:
    """An answer as it would go: seconds after the prefill, and the rounds in their order."""

    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Scene:
    """What the levels of one answer share."""

    recording: Recording
    costs: PassCosts
    stop: frozenset[int]
    clock: float = 0.0
    ran: str = ""  # the entry of the latest pass
    played: Played = field(default_factory=Played)

    def run_pass(self, entry: str, rows: int, at: int) -> float:
        """Let the time of a pass go by; return it."""
        seconds = self.costs.of(entry, rows, at, again=self.ran == entry)
        self.clock, self.ran = self.clock + seconds, entry
        return seconds


@dataclass(frozen=True)
class Asked:
    """What a level wants, as specqd.runtime.levels.Asked says; and what nobody can know but who plays a recording.

    `asker` would itself choose `future`; `on_text`: the text so far is the recording's.
    """

    want: int
    most: int
    held: int
    goes_on: Callable[[int, float, float], bool]
    asker: str
    future: Run
    on_text: bool


@dataclass
class Source:
    """A level to ask, and the rule for how many tokens to ask it for."""

    level: Searched | Compiled
    length: DraftLength


class Searched:
    """A search of the text; mirrors Looked."""

    def __init__(self, link: Link, scene: Scene) -> None:
        self.name, self._scene = link.name, scene
        self._search = SuffixLookup(link.least or _USUAL)

    def propose(self, text: list[int], asked: Asked) -> list[int]:
        """Propose the earlier continuation."""
        began = time.perf_counter()
        found = self._search.propose(text, min(asked.want, asked.most))
        for count in range(1, len(found)):
            if not asked.goes_on(count, math.nan, math.nan):
                del found[count:]
                break
        self._scene.clock += time.perf_counter() - began
        return found

    def keep(self, length: int) -> None:
        """Forget the text from `length` on."""
        self._search.keep(length)


class Compiled:
    """A level that says what was recorded and costs what was measured; mirrors Verifier."""

    def __init__(self, name: str, scene: Scene, below: Sequence[Source], shares: bool) -> None:
        self.name, self.fed = name, 0
        self._scene, self._below, self._shares = scene, below, shares
        self._took = self._made = 0.0
        self._most = scene.costs.checking[name][-1]

    def keep(self, length: int) -> None:
        """Crop the cache to `length` positions, and the levels below alike."""
        self.fed = min(self.fed, length)
        for source in self._below:
            source.level.keep(length)

    def propose(self, text: list[int], asked: Asked) -> list[int]:
        """Decode as this level would alone."""
        begin, found = len(text), list[int]()
        if self._shares:
            self.fed = asked.held
        own = self._continuation(begin, asked)
        recorded = self._scene.recording.text
        while True:
            rest = Run(own.tokens[len(found) :], own.doubts[len(found) :])
            on_text = asked.on_text and tuple(found) == recorded[begin : begin + len(found)]
            found += self.round(text, rest, asked.most - len(found), on_text)
            if found[-1] in self._scene.stop or len(found) >= asked.want:
                break
            if not asked.goes_on(len(found), *own.doubts[len(found) - 1]):
                break
        del text[begin:]
        return found

    def round(self, text: list[int], future: Run, room: int, on_text: bool) -> list[int]:
        """Append to `text` the tokens that one pass makes certain, which all are of `future`; return them."""
        scene = self._scene
        if len(text) - self.fed > self._most:
            self._fill(len(text) - 1)
        pending = len(text) - self.fed
        began = scene.clock
        asked, drafts = self._drafts(text, min(room - 1, self._most - pending), future, on_text)
        drafted = scene.clock
        took = scene.run_pass(self.name, pending + len(drafts), self.fed)
        agreed = next((i for i, token in enumerate(drafts) if token != future.tokens[i]), len(drafts))
        for source in asked:
            source.length.learn(len(drafts), agreed, drafted - began, took)
        new = list(future.tokens[: agreed + 1])
        ends = next((i for i, token in enumerate(new) if token in scene.stop), len(new))
        del new[ends + 1 :]
        text += new
        self._took = _MEMORY * self._took + scene.clock - began
        self._made = _MEMORY * self._made + agreed + 1
        self.keep(len(text) - 1)
        self.fed = len(text) - 1
        if drafts:
            scene.played.rounds.append(
                Round(self.name, asked[0].level.name, len(drafts), min(agreed, len(new)))
            )
        return new

    def _fill(self, length: int) -> None:
        for rows in reversed(self._scene.costs.rows(self.name)):
            while length - self.fed >= rows:
                self._scene.run_pass(self.name, rows, self.fed)
                self.fed += rows

    def _drafts(
        self, text: list[int], most: int, future: Run, on_text: bool
    ) -> tuple[Sequence[Source], list[int]]:
        pace = self._took / self._made if self._made else math.inf
        for source in self._below:
            want = min(source.length.choose(pace), most)
            asked = Asked(want, most, self.fed, source.length.goes_on, self.name, future, on_text)
            if want > 0 and (found := source.level.propose(text, asked)):
                return (source,), found
        return self._below, []

    def _continuation(self, length: int, asked: Asked) -> Run:
        """Return what this level says after the text of this length, always for DEPTH tokens.

        Off the recording it is not known. Then it agrees with the asking level for as long as both do at the same
        place of the recording.
        """
        runs = self._scene.recording.runs
        place = min(length, len(self._scene.recording.text) - 1)
        own = runs[self.name][place]
        tokens = list(own.tokens)
        if not asked.on_text or place < length:
            others = runs[asked.asker][place].tokens
            agreed = next(
                (i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens)
            )
            tokens = [*asked.future.tokens[:agreed], *_unknown(length, len(tokens) - agreed)]
        missing = DEPTH - len(tokens)
        tokens += _unknown(length + DEPTH, missing)
        return Run(tuple(tokens), (*own.doubts, *own.doubts[-1:] * missing))


def _unknown(place: int, count: int) -> list[int]:
    """Tokens that are no one else's, so that nothing agrees with them and no search finds them again."""
    return [-(place * DEPTH + i + 1) for i in range(count)]

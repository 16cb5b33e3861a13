"""Levels of speculation: each proposes tokens to the one above it, and may have them proposed to itself first.

A chain `target <- draft <- suffix` is a `Verifier` whose `below` is a `Verifier` whose `below` looks text up. Each
verifier keeps what it would have chosen itself, so what it proposes is distributed as if it had decoded alone,
however many levels helped it (ML-SpecQD, arXiv 2503.13565).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from specqd.manifest import OBSERVER
from specqd.runtime.asking import Alone, Asked, Entries, Level, LevelStats, Pass, Place, Round, Steps
from specqd.runtime.choosing import Choice, Chooser
from specqd.runtime.drafting import DraftLength
from specqd.runtime.lookup import SuffixLookup
from specqd.runtime.output import Output
from specqd.runtime.selecting import Schedule

__all__ = ["Looked", "Source", "Verifier"]

_MEMORY = 0.97  # weight of a round in the pace of a level after each further round


class Looked:
    """A level that costs no pass: it proposes what followed the same words earlier in the text."""

    def __init__(self, name: str, search: SuffixLookup) -> None:
        self.stats = LevelStats(name)
        self._search = search

    def propose(self, text: list[int], asked: Asked) -> Steps[list[Choice]]:
        """Propose the earlier continuation, as certainties."""
        yield from ()
        began = time.perf_counter()
        found = self._search.propose(text, min(asked.want, asked.most))
        for count in range(1, len(found)):
            if not asked.goes_on(count, math.nan, math.nan):
                del found[count:]
                break
        self.stats.seconds += time.perf_counter() - began
        self.stats.passes += 1
        self.stats.proposed += len(found)
        return [Choice(token) for token in found]

    def keep(self, length: int) -> None:
        """Forget the text from `length` on."""
        self._search.keep(length)


@dataclass
class Source:
    """A level to ask, and the rule for how many tokens to ask it for."""

    level: Level
    length: DraftLength


@dataclass
class Verifier:
    """A compiled entry of the engine, which checks in one pass of several rows what the level below proposes.

    `engine` says what the entry takes, `place` what the sequence may use. `schedule`: when to select positions of its
    cache. `below`: whom to ask, the next only if the
    one before proposes nothing. `shares`: it reads and writes the cache of the level that asks it, so it
    needs no prefill of its own. `fed`: positions of the text that its cache holds; `began`: where it last proposed.
    """

    engine: Entries
    entry: str
    chooser: Chooser
    below: Sequence[Source] = ()
    shares: bool = False
    stop: Collection[int] = ()
    on_round: Callable[[Round], None] | None = None
    place: Place = field(default_factory=Alone)
    schedule: Schedule | None = None
    fed: int = 0
    began: int = field(default=0, init=False)
    stats: LevelStats = field(init=False)

    def __post_init__(self) -> None:
        """Start the figures."""
        self.stats = LevelStats(self.entry)
        self._doubt = (math.nan, math.nan)
        self._took = self._made = 0.0  # seconds and tokens of recent rounds

    @property
    def _pace(self) -> float:
        return self._took / self._made if self._made else math.inf

    def keep(self, length: int) -> None:
        """Crop the cache to `length` positions, and the levels below alike."""
        self.fed = min(self.fed, length)
        for source in self.below:
            source.level.keep(length)

    def prefill(self, text: list[int]) -> Steps[Choice]:
        """Feed the whole text; append the token after it."""
        while self.schedule and self.fed < len(text):
            self.schedule.begin(len(text))
            if self.schedule.due > len(text):
                break
            output = yield from self._observe(text)
        if self.fed < len(text):
            output = yield from self._fill(text, len(text))
        (new,) = self.chooser.verify(output, len(output.next) - 1, text, ())
        text.append(new.token)
        return new

    def _fill(self, text: list[int], length: int) -> Steps[Output]:
        """Feed the text up to `length` in the largest pieces there are; return what the last one says."""
        for rows in reversed(self.engine.rows(self.entry)):
            while length - self.fed >= rows:
                output = yield Pass(self.entry, text[self.fed : self.fed + rows], self.fed)
                self.fed += rows
        return output

    def _passes(self, length: int) -> int:
        """Return how many passes feed the text up to there."""
        count, left = 0, length - self.fed
        for rows in reversed(self.engine.rows(self.entry)):
            count, left = count + left // rows, left % rows
        return count

    def _observe(self, text: list[int]) -> Steps[Output]:
        """Feed the text up to where a selection is due, the last rows by the observer; return what it says."""
        assert self.schedule is not None
        due = self.schedule.due
        start = max(0, due - self.schedule.selection.window)
        if self.fed < start:
            yield from self._fill(text, min(range(start, due + 1), key=self._passes))
        # What was fed before is fed again: the same bits, but now its attention is told.
        output = yield Pass(OBSERVER, text[start:due], start)
        self.fed = due
        self.schedule.done()
        return output

    def propose(self, text: list[int], asked: Asked) -> Steps[list[Choice]]:
        """Decode as this level would alone."""
        self.began, found = len(text), list[Choice]()
        if self.shares:
            self.fed = asked.held
        while self.engine.room(self.entry, len(text) - 1):
            found += yield from self.round(text, asked.most - len(found))
            if found[-1].token in self.stop or len(found) >= asked.want:
                break
            if not asked.goes_on(len(found), *self._doubt):
                break
        del text[self.began :]
        self.stats.proposed += len(found)
        return found

    def round(self, text: list[int], room: int) -> Steps[list[Choice]]:
        """Append to `text` the tokens that one pass makes certain, 1 to `room`; return them.

        Ends with the first stop token. The cache must have a place for the last token of the text.
        """
        schedule = self.schedule
        observed = schedule is not None and schedule.due <= len(text)
        if observed and schedule and schedule.drops:
            return (yield from self._observed_round(text))
        if len(text) - self.fed > self._rows(text):
            yield from self._fill(text, len(text) - 1)
        rows, pending = self._rows(text), len(text) - self.fed
        began = self.place.spent()
        asked, drafts = yield from self._drafts(text, min(room - 1, rows - pending))
        drafted = self.place.spent()
        output, last = yield from self._verify(text, drafts, observed)
        new = self.chooser.verify(output, last, text, drafts)
        verified = self.place.spent()
        agreed = len(new) - 1
        self._doubt = output.confidence(last + agreed)
        for source in asked:
            source.length.learn(len(drafts), agreed, drafted - began, verified - drafted)
        ends = next((i for i, one in enumerate(new) if one.token in self.stop), len(new))
        del new[ends + 1 :]
        text += [one.token for one in new]
        self._took = _MEMORY * self._took + verified - began
        self._made = _MEMORY * self._made + agreed + 1
        self.stats.passes += 1
        self.stats.seconds += verified - drafted
        self.keep(len(text) - 1)
        self.fed = len(text) - 1
        if drafts:
            self._report(asked[0].level.stats, drafts, min(agreed, len(new)), new)
        return new

    def _verify(self, text: list[int], drafts: Sequence[Choice], observed: bool) -> Steps[tuple[Output, int]]:
        """Feed what the cache lacks of the text, and the drafts; return what is said, and the row of the newest token.

        If the pass is to be `observed`, so many positions before are fed again that the observer has its rows.
        """
        first, entry = self.fed, self.entry
        if observed:
            assert self.schedule is not None
            first, entry = len(text) + len(drafts) - self.schedule.selection.window, OBSERVER
            self.schedule.done()
        output = yield Pass(entry, [*text[first:], *(draft.token for draft in drafts)], first)
        return output, len(text) - 1 - first

    def _observed_round(self, text: list[int]) -> Steps[list[Choice]]:
        """Append the one token that the observer's pass makes certain."""
        began = self.place.spent()
        output = yield from self._observe(text)
        (new,) = self.chooser.verify(output, len(output.next) - 1, text, ())
        text.append(new.token)
        self.stats.passes += 1
        self.stats.seconds += self.place.spent() - began
        return [new]

    def _rows(self, text: list[int]) -> int:
        """Most rows of the next pass."""
        rows = min(self.engine.room(self.entry, self.fed), self.place.share())
        return min(rows, self.schedule.rows(self.fed, len(text))) if self.schedule else rows

    def _drafts(self, text: list[int], most: int) -> Steps[tuple[Sequence[Source], list[Choice]]]:
        """Ask the levels below; return who answered and what, or all of them and nothing."""
        for source in self.below:
            want = min(source.length.choose(self._pace), most)
            if want > 0:
                asked = Asked(want, most, self.fed, source.length.goes_on)
                found = yield from source.level.propose(text, asked)
                if found:
                    return (source,), found
        return self.below, []

    def _report(self, below: LevelStats, drafts: list[Choice], agreed: int, new: list[Choice]) -> None:
        """Count what became of the drafts of the level below."""
        below.accepted += agreed
        below.examined += min(agreed + 1, len(drafts))
        if self.on_round:
            tokens = (tuple(one.token for one in part) for part in (drafts, new))
            self.on_round(Round(self.entry, below.name, *tokens))

"""Several sequences decoded together: passes that they ask for at the same time become one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from specqd.errors import SpecqdError
from specqd.manifest import OBSERVER
from specqd.runtime.asking import Pass, Steps
from specqd.runtime.cost_aware import PassCost
from specqd.runtime.engine import Engine, Piece
from specqd.runtime.generate import Decoding
from specqd.runtime.output import Output
from specqd.runtime.plan import Rules
from specqd.runtime.request import Request

__all__ = ["Batch"]


@dataclass(eq=False)
class _Running:
    """A sequence in the batch, and its place there: `seconds` are its share of each pass that it has rows in."""

    request: Request
    share: Callable[[], int]
    seconds: float = 0.0
    sequence: int = field(init=False)
    decoding: Decoding = field(init=False)
    steps: Steps[list[int]] = field(init=False)
    wanted: Pass = field(init=False)

    def spent(self) -> float:
        return self.seconds


class Batch:
    """Decodes the sequences that were added, as many together as the engine has place for; the others wait.

    What a sequence gets is what it would get alone. One that begins like another whose prompt is being fed waits for
    that, and then shares it. Deeper levels go first, so that those above them find many
    sequences waiting for the same pass; among the passes of a level the longest asked for goes first.
    """

    def __init__(self, engine: Engine, rules: Rules | None = None) -> None:
        self._engine = engine
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []  # the one whose pass was asked for first, first
        self._rules: Rules = {} if rules is None else rules
        self._cost = {entry: PassCost() for entry in engine.entries}
        self._depth = {entry: depth for depth, entry in enumerate(engine.entries)}
        self._most = min(engine.rows(entry, every_row=True)[-1] for entry in engine.entries)
        self.passes = 0

    def add(self, request: Request) -> None:
        """Put a sequence at the end of the queue; one that can never be decoded gets its `error` at once."""
        one = _Running(request, self._share)
        try:
            one.decoding = request.begin(self._engine, self._rules, one)
        except SpecqdError as error:
            request.error = error
            return
        self._waiting.append(one)

    def __len__(self) -> int:
        """Sequences that are not finished."""
        return len(self._waiting) + len(self._running)

    def step(self) -> list[tuple[Request, list[int]]]:
        """Run one pass; return the new tokens of each sequence that got any. A sequence that failed gets none."""
        self._admit()
        if not self._running:
            return []
        together = self._choose()
        given = []
        for one, output in zip(together, self._run(together), strict=True):
            self._running.remove(one)
            tokens = self._resume(one, output)
            if tokens is not None:
                given.append((one.request, tokens))
        return given

    def cancel(self, request: Request) -> None:
        """Drop a sequence, wherever it stands."""
        self._waiting = deque(one for one in self._waiting if one.request is not request)
        for one in [one for one in self._running if one.request is request]:
            self._running.remove(one)
            self._end(one)

    def _admit(self) -> None:
        """Begin waiting sequences, in order, while one has a place to go to."""
        tables = self._engine.tables
        while self._waiting and not self._prefix_is_coming(self._waiting[0].decoding):
            sequence = tables.take()
            if sequence is None:
                return
            one = self._waiting[0]
            if not one.decoding.enter(sequence, self._engine.slots(one.request.positions)):
                tables.release(sequence)
                return
            one.sequence = sequence
            one.steps = one.decoding.advance()
            self._resume(self._waiting.popleft(), None)

    def _prefix_is_coming(self, decoding: Decoding) -> bool:
        """Whether a sequence whose prompt is being fed will have more to share with this one than is known now."""
        mine = decoding.sharing
        if mine is None:
            return False
        feeding = [one.decoding for one in self._running if not one.decoding.stats.new_tokens]
        return any(other.sharing is not None and mine.awaits(other.sharing) for other in feeding)

    def _share(self) -> int:
        """Rows that a sequence may have, so that all fit into one pass: a second one would cost what drafts gain."""
        return max(1, self._most // max(1, len(self._running)))

    def _resume(self, one: _Running, output: Output | None) -> list[int] | None:
        """Let a sequence go on until it asks for its next pass; return the tokens that became certain, if any."""
        tokens = None
        try:
            try:
                one.wanted = next(one.steps) if output is None else one.steps.send(output)
            except StopIteration as end:
                tokens = end.value
                if one.decoding.stats.finish:
                    self._end(one)
                    return tokens
                one.steps = one.decoding.advance()
                one.wanted = next(one.steps)
        except SpecqdError as error:
            one.request.error = error
            self._end(one)
            return tokens
        self._running.append(one)
        return tokens

    def _end(self, one: _Running) -> None:
        one.steps.close()
        one.decoding.leave()
        self._engine.tables.release(one.sequence)

    def _choose(self) -> list[_Running]:
        """Return the sequences whose wanted passes become one."""
        entry = max((one.wanted.entry for one in self._running), key=lambda entry: self._depth.get(entry, 0))
        asking = [one for one in self._running if one.wanted.entry == entry]
        if entry == OBSERVER:
            return asking[:1]  # it looks at one sequence
        most = self._engine.rows(entry, every_row=True)[-1]
        if len(asking[0].wanted.tokens) > most:
            return asking[:1]  # a piece of a prompt
        together, rows = [], 0
        for one in asking:
            if rows + len(one.wanted.tokens) <= most:
                together.append(one)
                rows += len(one.wanted.tokens)
        return together

    def _run(self, together: list[_Running]) -> Iterator[Output]:
        """Run one pass for all; give each its rows."""
        engine, entry = self._engine, together[0].wanted.entry
        pieces = [Piece(one.wanted.tokens, one.wanted.start, one.sequence) for one in together]
        rows = [len(piece.tokens) for piece in pieces]
        before = engine.seconds
        output = engine.feed_pieces(entry, pieces)
        seconds = engine.seconds - before
        self.passes += 1
        cost = self._cost.setdefault(entry, PassCost())
        cost.learn(sum(rows), seconds)
        # What a row costs more is the sequence's own; what the pass costs anyway is shared.
        of_rows = min(cost.row, seconds / sum(rows))
        of_all = (seconds - of_rows * sum(rows)) / len(together)
        first = 0
        for one, count in zip(together, rows, strict=True):
            one.seconds += of_all + of_rows * count
            yield output if len(together) == 1 else output.part(first, count)
            first += count

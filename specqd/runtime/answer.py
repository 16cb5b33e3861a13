"""An answer while it grows: from rounds of tokens to text, up to where it ends."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from specqd.runtime.generate import Stats
from specqd.runtime.logprobs import Scored, TokenScore
from specqd.runtime.stopping import StopStrings
from specqd.runtime.text import Detokenizer

__all__ = ["Answer"]


class Answer:
    """Tokens, their scores and their text, up to a stop string.

    Tokens are taken one by one, so that which of them completes a stop string does not depend on how many a round
    gives. `tokens` ends with that one, `text` before it. `scores` is empty unless a `scored` chooser notes them.
    """

    def __init__(
        self,
        stats: Stats,
        detokenizer: Detokenizer | None,
        stop: StopStrings,
        scored: Scored | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        self.stats = stats
        self.tokens: list[int] = []
        self.scores: list[TokenScore] = []
        self.scored = scored
        self._detokenizer, self._stop, self._cancel = detokenizer, stop, cancel

    def pieces(self, rounds: Iterator[list[int]]) -> Generator[str, None, None]:
        """Yield the text as it becomes certain; ends with the rounds, at a stop string or when cancelled.

        Closing it cancels too. Whether to cancel is asked before each round.
        """
        try:
            while not self.over and (new := next(rounds, None)) is not None:
                if piece := self.add(new):
                    yield piece
            if piece := self.finish():
                yield piece
        except GeneratorExit:
            self.stats.finish = self.stats.finish or "cancelled"
            raise

    def add(self, new: list[int]) -> str:
        """Take the tokens of a round; return the text that is now certain."""
        before, piece = len(self.tokens), ""
        for token in new:
            self.tokens.append(token)
            if self._detokenizer:
                piece += self._ended(self._detokenizer.add([token]))
            if self._stop.met:
                break
        kept = len(self.tokens) - before
        self.stats.new_tokens -= len(new) - kept
        if self.scored:
            self.scores += self.scored.take(kept)
        return piece

    def finish(self) -> str:
        """Return the text that was held back."""
        if self._stop.met or not self._detokenizer:
            return ""
        return self._ended(self._detokenizer.finish()) + self._stop.finish()

    def _ended(self, piece: str) -> str:
        piece = self._stop.add(piece)
        if self._stop.met:
            self.stats.finish = "stop"
        return piece

    @property
    def over(self) -> bool:
        """Whether it ended before the rounds did: at a stop string, or cancelled, which is asked now."""
        if not self.stats.finish and self._cancel and self._cancel():
            self.stats.finish = "cancelled"
        return self._stop.met or self.stats.finish == "cancelled"

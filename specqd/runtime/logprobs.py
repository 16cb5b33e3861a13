"""How probable the target held the tokens of an answer, and which others it thought of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specqd.errors import InputError
from specqd.runtime.choosing import Choice, Chooser
from specqd.runtime.output import Output

__all__ = ["Scored", "TokenScore"]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of an answer: its log-probability, and the most likely tokens in its place with theirs, best first.

    They are those of the softmax of the target's logits (temperature 1, nothing excluded or penalised), in nats.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Scored:
    """A chooser that also notes the scores of what it chooses, with the `top` most likely tokens each.

    Raises:
        InputError: `top` is below 1.
    """

    def __init__(self, chooser: Chooser, top: int) -> None:
        if top < 1:
            raise InputError(
                f"cannot give the {top} most likely tokens: ask for 1 or more, or 0 for no logprobs"
            )
        self._chooser = chooser
        self._top = top
        self._noted: list[TokenScore] = []

    def verify(self, output: Output, first: int, text: list[int], drafts: Sequence[Choice]) -> list[Choice]:
        """Check as the chooser does."""
        new = self._chooser.verify(output, first, text, drafts)
        self._noted += [self._score(output.row(first + i), one.token) for i, one in enumerate(new)]
        return new

    def take(self, count: int) -> list[TokenScore]:
        """Return the first `count` scores since the last call; forget the others, whose tokens were dropped."""
        taken = self._noted[:count]
        self._noted.clear()
        return taken

    def _score(self, logits: np.ndarray, token: int) -> TokenScore:
        exact = logits.astype(np.float64)
        highest = float(exact.max())
        total = highest + math.log(np.exp(exact - highest).sum())
        count = min(self._top, len(exact))
        best = np.argpartition(-exact, count - 1)[:count]
        best = best[np.lexsort((best, -exact[best]))]
        top = tuple((int(i), float(exact[i]) - total) for i in best)
        return TokenScore(token, float(exact[token]) - total, top)

"""How a level chooses tokens, and how it checks those that were proposed to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specqd.runtime.acceptance import Stream, rejection
from specqd.runtime.noise import Noise
from specqd.runtime.output import Output
from specqd.runtime.sampling import Sampling

__all__ = ["Choice", "Chooser", "Coupled", "Greedy", "Rejecting", "chooser"]


@dataclass(slots=True)
class Choice:
    """A token, and the distribution (float64 `[vocab]`) it was drawn from; None: certain, or not needed."""

    token: int
    distribution: np.ndarray | None = None


class Chooser(Protocol):
    """Turns the rows of a pass into tokens; the same one for every level of a chain, and for one request only."""

    def verify(self, output: Output, first: int, text: list[int], drafts: Sequence[Choice]) -> list[Choice]:
        """Check `drafts`, proposed after `text`, against rows `first`, `first + 1`, ... of a pass.

        Returns the drafts that stand, and one token more: in place of the first that does not, or after all.
        Each is distributed as if drawn from its row alone, whatever the drafts were.
        """
        ...


def chooser(sampling: Sampling | None) -> Chooser:
    """Return a new chooser for a request; None samples nothing."""
    if sampling is None or (sampling.greedy and sampling.repetition_penalty == 1):
        return Greedy()
    return Rejecting(sampling) if sampling.coupling == "rejection" else Coupled(sampling)


class Greedy:
    """The most likely token, always."""

    def verify(self, output: Output, first: int, text: list[int], drafts: Sequence[Choice]) -> list[Choice]:
        """Keep the longest prefix of drafts that the rows choose too."""
        new = []
        for i in range(len(drafts) + 1):
            new.append(Choice(output.token(first + i)))
            if i < len(drafts) and drafts[i].token != new[-1].token:
                break
        return new


class Coupled:
    """Samples by the noise of each position, which all levels share: near distributions mostly pick the same token.

    So drafts are checked by equality, and a seed gives the same text whatever is drafted.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._noise = Noise(sampling.seed)

    def verify(self, output: Output, first: int, text: list[int], drafts: Sequence[Choice]) -> list[Choice]:
        """Keep the longest prefix of drafts that the rows pick too."""
        new: list[Choice] = []
        for i in range(len(drafts) + 1):
            # Up to here the drafts are what was picked, so they are the text that the penalty is about.
            seen = [*text, *(one.token for one in new)] if self._sampling.looks_back else ()
            tokens, weights = self._sampling.weights(output.row(first + i), seen)
            new.append(Choice(self._noise.pick(weights, len(text) + i, tokens)))
            if i < len(drafts) and drafts[i].token != new[-1].token:
                break
        return new


class Rejecting:
    """Samples drafts from their level's own distribution, and rejects as many as makes up for it.

    No rule that knows nothing but the two distributions keeps more drafts, but a seed repeats the text only if the
    same tokens are drafted (see specqd.runtime.acceptance).
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._chance = Stream(sampling.seed)

    def verify(self, output: Output, first: int, text: list[int], drafts: Sequence[Choice]) -> list[Choice]:
        """Keep or reject each draft by chance, until one is rejected; every token comes with its distribution."""
        tokens = [draft.token for draft in drafts]
        read: list[np.ndarray] = []

        def row(i: int) -> np.ndarray:
            seen = [*text, *tokens[:i]] if self._sampling.looks_back else ()
            read.append(self._sampling.distribution(output.row(first + i), seen))
            return read[-1]

        q = [draft.distribution for draft in drafts]
        new = rejection(tokens, q, map(row, range(len(drafts) + 1)), self._chance)
        return [Choice(token, p) for token, p in zip(new, read, strict=True)]

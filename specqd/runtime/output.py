"""Output: what one pass says of each of its rows; views of buffers that the next such pass overwrites."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from specqd.errors import InputError

__all__ = ["Output"]


@dataclass(frozen=True)
class Output:
    """The rows of a pass.

    `next` int32 `[rows]` are the greedy choices, `logits` float32 `[rows, n]` and `sums` float32 `[rows, 2]` as
    compiled (None if the function gives none). `vocabulary` is the number of the target's tokens, which may be
    more or fewer than `n`: vocabularies are padded differently.
    """

    next: np.ndarray
    logits: np.ndarray | None
    sums: np.ndarray | None
    vocabulary: int

    def part(self, first: int, count: int) -> Output:
        """Return `count` rows from `first` on."""
        logits, sums = (x if x is None else x[first : first + count] for x in (self.logits, self.sums))
        return replace(self, next=self.next[first : first + count], logits=logits, sums=sums)

    def token(self, row: int) -> int:
        """The greedy choice after a row, among the target's tokens."""
        chosen = int(self.next[row])
        return chosen if chosen < self.vocabulary else int(self.row(row).argmax())

    def row(self, row: int) -> np.ndarray:
        """Float32 logits of the target's vocabulary; -inf for tokens that the entry does not know.

        Raises:
            InputError: the function was compiled to give tokens only.
        """
        if self.logits is None:
            raise InputError("the artifact was compiled to give tokens, not logits: compile it again")
        own = self.logits[row, : self.vocabulary]
        if len(own) == self.vocabulary:
            return own
        whole = np.full(self.vocabulary, -np.inf, np.float32)
        whole[: len(own)] = own
        return whole

    def confidence(self, row: int) -> tuple[float, float]:
        """Probability of the greedy choice and entropy (nats) of a row, at temperature 1; NaN if not compiled."""
        if self.sums is None:
            return math.nan, math.nan
        total, spread = self.sums[row].tolist()
        return 1.0 / total, math.log(total) + spread / total

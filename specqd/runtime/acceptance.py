"""Rejection sampling of drafts: what stands is distributed as if the verifier had sampled alone.

Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from specqd.errors import InputError

__all__ = ["Chance", "Stream", "rejection"]

_BLOCK = 256


class Chance(Protocol):
    """Decides by chance. No decision may depend on another, nor on numbers that were used before."""

    def accepts(self, p: float, q: float) -> bool:
        """Return True with probability min(1, p / q)."""
        ...

    def draw(self, weights: np.ndarray) -> int:
        """Return an index with a probability proportional to its weight."""
        ...


class Stream:
    """Decides by one stream of random numbers (Philox), each used once.

    Numbers are not tied to positions, as those of `specqd.runtime.noise.Noise` are: a number seen in a draft that
    was dropped, and that had a say in how long the next draft is, must not choose a token again. So a seed repeats
    the output only if draft lengths repeat too, which those that follow measured times do not.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = np.random.Generator(np.random.Philox(seed))

    def accepts(self, p: float, q: float) -> bool:
        """Return True with probability min(1, p / q)."""
        return self._generator.random() * q < p

    def draw(self, weights: np.ndarray) -> int:
        """Return an index with a probability proportional to its weight.

        Raises:
            InputError: the weights have no finite sum above 0.
        """
        # A block first, then a token of it: adding up all one by one takes five times as long.
        sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
        ends = np.cumsum(sums)
        total = float(ends[-1])
        if not 0 < total < np.inf:
            raise InputError(f"cannot sample: the probabilities sum to {total}, so the logits are broken")
        at = self._generator.random() * total
        block = int(np.searchsorted(ends, at, side="right"))
        within = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK])
        left = at - ends[block - 1] if block else at
        # Rounding must not lead beyond the last token that has a weight.
        left = min(left, np.nextafter(within[-1], 0))
        return block * _BLOCK + int(np.searchsorted(within, left, side="right"))


def rejection(
    drafts: Sequence[int], q: Sequence[np.ndarray | None], p: Iterable[np.ndarray], chance: Chance
) -> list[int]:
    """Check drafts; return those that stand, and one token more: in place of the first that does not, or after all.

    Draft i was drawn from `q[i]`, float64 `[vocab]`, or was certain (None): found in the text, or a greedy choice.
    `p` gives the verifier's own distributions, alike, at each draft and after the last; only as many are read as
    tokens are returned, so it may compute them on demand. The returned token i is distributed as the i-th of
    `p`, given those before it, whatever `q` is. So if the verifier drafts for another level, `p` is that level's `q`.

    Raises:
        InputError: a distribution that is needed holds NaN or no probability at all.
    """
    rows = iter(p)
    new: list[int] = []
    for token, drawn_from in zip(drafts, q, strict=True):
        own = next(rows)
        if not chance.accepts(own[token], 1 if drawn_from is None else drawn_from[token]):
            return [*new, chance.draw(_residual(own, drawn_from, token))]
        new.append(token)
    return [*new, chance.draw(next(rows))]


def _residual(p: np.ndarray, q: np.ndarray | None, token: int) -> np.ndarray:
    """What `p` has beyond `q`, not normalised; `p` itself where rounding leaves nothing."""
    if q is None:
        rest = p.copy()
        rest[token] = 0
    else:
        rest = np.maximum(p - q, 0)
    return rest if rest.any() else p

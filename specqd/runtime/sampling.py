"""Sampling: which distribution a row of logits stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from specqd.errors import InputError

__all__ = ["Sampling"]

_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what each parameter means, and their order, are those of transformers' `generate`.

    Attributes:
        temperature: logits are divided by it; 0 chooses the most likely token, the first among equals.
        top_k: keep the `top_k` most likely tokens and those equal to the last of them; 0 keeps all.
        top_p: keep the fewest most likely tokens that together have at least this probability.
        min_p: keep tokens with at least this share of the most likely one's probability.
        repetition_penalty: logits of tokens of the text are divided by it, negative ones multiplied.
        seed: makes a request repeatable; None: every request differs.
        coupling: how drafts are checked. `noise` gives the same text for a seed whatever is drafted; `rejection` keeps
            more drafts, and its text has the same distribution (see specqd.runtime.choosing).

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    coupling: Literal["noise", "rejection"] = "noise"

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name, fits, asked in (
            ("temperature", lambda x: 0 <= x < math.inf, "a number of 0 or more"),
            ("top_k", lambda x: x >= 0 and x == int(x), "a whole number of 0 or more; 0 keeps all tokens"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1; 1 keeps all tokens"),
            ("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1; 0 keeps all tokens"),
            ("repetition_penalty", lambda x: 0 < x < math.inf, "a number above 0; 1 penalises nothing"),
            ("seed", lambda x: 0 <= x < 2**64 and x == int(x), "a whole number from 0 to 2^64 - 1, or none"),
        ):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if (
                not isinstance(value, int | float)
                or math.isnan(value)
                or math.isinf(value)
                or not fits(value)
            ):
                raise InputError(f"cannot sample with {name} = {value!r}: give {asked}")
        if self.coupling not in ("noise", "rejection"):
            raise InputError(f"cannot sample with coupling = {self.coupling!r}: give noise or rejection")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature == 0

    @property
    def looks_back(self) -> bool:
        """Whether the text so far changes what comes next, beyond the logits."""
        return self.repetition_penalty != 1

    def distribution(self, logits: np.ndarray, history: Sequence[int] = ()) -> np.ndarray:
        """Return the probabilities, float64 `[vocab]`, of the token after the text `history`; see `weights`."""
        tokens, weights = self.weights(logits, history)
        p = weights.astype(np.float64)
        p /= p.sum()
        if tokens is None:
            return p
        probabilities = np.zeros(len(logits))
        probabilities[tokens] = p
        return probabilities

    def weights(
        self, logits: np.ndarray, history: Sequence[int] = ()
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Return which tokens may follow the text `history`, None for all, and in proportion how likely each is.

        `logits` are float32 `[vocab]`, -inf excludes a token; weights are float32, at most 1.

        Raises:
            InputError: a logit is NaN or +inf, or all are -inf.
        """
        scores = self._penalised(logits, history)
        top = scores.max()
        if not np.isfinite(top):
            raise InputError(
                f"cannot sample from logits whose largest is {top}: the weights or the input are broken"
            )
        if self.greedy:
            return np.array([scores.argmax()]), np.ones(1, np.float32)
        kept = None
        if 0 < self.top_k < len(scores):
            kept = _largest(scores, int(self.top_k))
            scores = scores[kept]
        scores = scores - top
        scores /= self._temperature32
        weights = np.exp(scores, out=scores)
        if self.top_p < 1:
            head = _head(weights, 1 - self.top_p)
            kept, weights = head if kept is None else kept[head], weights[head]
        if self.min_p > 0:
            weights[weights < self.min_p * float(weights.max())] = 0.0
        return kept, weights

    @property
    def _temperature32(self) -> float:
        """The temperature, or the nearest that float32 can divide by: no logits are told apart or equalled by more."""
        return min(max(self.temperature, _TINY), _HUGE)

    def _penalised(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        if not self.looks_back or not len(history):
            return logits
        scores, seen = logits.copy(), np.asarray(history)
        own = logits[seen]
        scores[seen] = np.where(own < 0, own * self.repetition_penalty, own / self.repetition_penalty)
        return scores


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest scores and of those equal to the last of them."""
    # `count` of the groups have a maximum no less than their own count-th largest, so what is below it is no candidate.
    groups = max(count, len(scores) // 32)
    deep = len(scores) // groups
    maxima = scores[: groups * deep].reshape(deep, groups).max(axis=0)
    candidates = np.flatnonzero(scores >= np.partition(maxima, groups - count)[groups - count])
    near = scores[candidates]
    return candidates[near >= np.partition(near, len(near) - count)[len(near) - count]]


def _head(weights: np.ndarray, mass: float) -> np.ndarray:
    """Return the indices of all weights but the smallest that have at most the share `mass` together.

    The largest is always among them; of equal ones the first go first.
    """
    total = float(weights.sum())
    large = np.flatnonzero(weights > mass / len(weights) * total)
    weights = weights[large] / np.float64(total)
    # Exponent and four bits of mantissa order weights by size; only those of the bin where the border lies are sorted.
    bins = weights.view(np.int64) >> 48
    bins -= bins.min()
    below = 1.0 - weights.sum() + np.cumsum(np.bincount(bins, weights))
    border = min(int(np.searchsorted(below, mass, side="right")), len(below) - 1)
    unsure = np.flatnonzero(bins == border)
    order = unsure[np.argsort(weights[unsure], kind="stable")]
    above = np.flatnonzero(bins > border)
    ends = 1.0 - weights[above].sum() - weights[order].sum() + np.cumsum(weights[order])
    out = int(np.searchsorted(ends, mass, side="right"))
    return large[np.concatenate([order[out if len(above) else min(out, len(order) - 1) :], above])]

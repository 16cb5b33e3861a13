"""Sampling: which distribution a row of logits stands for, and the noise that picks a token of it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from specqd.errors import InputError

__all__ = ["Noise", "Sampling"]

_BLOCK = (
    8192  # tokens at a time: temporary arrays of a whole vocabulary would be new pages of memory each time
)
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
        """Return the probabilities, float64 `[vocab]`, of the token after the text `history`.

        `logits` are float32 `[vocab]`; -inf excludes a token.

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
            certain = np.zeros(len(scores))
            certain[scores.argmax()] = 1.0
            return certain
        kept = None
        if 0 < self.top_k < len(scores):
            kept = _largest(scores, int(self.top_k))
            scores = scores[kept]
        weights = np.exp((scores - top) / self._temperature32).astype(np.float64)
        weights /= weights.sum()
        if self.top_p < 1:
            head = _head(weights, 1 - self.top_p)
            kept, weights = head if kept is None else kept[head], weights[head]
        if self.min_p > 0:
            weights[weights < self.min_p * weights.max()] = 0.0
        weights /= weights.sum()
        if kept is None:
            return weights
        probabilities = np.zeros(len(logits))
        probabilities[kept] = weights
        return probabilities

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


class Noise:
    """The random numbers of one request: one for each position and token, whenever and however often asked for.

    A level that picks by the noise of a position picks the same token from the same distribution in a pass of any
    size, and two levels whose distributions are near mostly pick the same one. Drafts are then checked by equality,
    and sampled output is the same with speculation as without.

    The numbers are those of SplitMix64 (Steele et al. 2014), begun anew for each position: token i takes the number
    i + 1 of its sequence.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = secrets.randbits(64) if seed is None else seed

    def pick(self, distribution: np.ndarray, position: int) -> int:
        """Return a token, distributed as `distribution` (float64 `[vocab]`) over seeds and over positions.

        It is the argmax of log p + g with Gumbel noise g.
        """
        # The argmin of -log(1 - u) / p is the same. Since -log(1 - u) >= u, few tokens need their logarithm.
        possible = np.flatnonzero(distribution > 0)
        best, chosen = math.inf, -1
        for begin in range(0, len(possible), _BLOCK):
            tokens = possible[begin : begin + _BLOCK]
            p, u = distribution[tokens], self._uniforms(tokens, position)
            least = u / p
            first = least.argmin()
            near = np.flatnonzero(least <= -np.log1p(-u[first]) / p[first])
            race = -np.log1p(-u[near]) / p[near]
            if race.min() < best:
                best, chosen = race.min(), int(tokens[near[race.argmin()]])
        return chosen

    def _uniforms(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Numbers strictly between 0 and 1, with 52 random bits, since 53 could round to 1."""
        begin = _mixed(np.array([self._seed], np.uint64) + _STEP)
        begin = _mixed(begin + np.uint64(position + 1) * _STEP)
        numbers = _mixed(begin + (tokens.astype(np.uint64) + np.uint64(1)) * _STEP)
        # As the mantissa of a number from 1 to 2: converting integers takes twenty times as long.
        return ((numbers >> np.uint64(12)) | _ONE).view(np.float64) - (1 - 2.0**-53)


_ONE = np.uint64(0x3FF0000000000000)
_STEP = np.array([0x9E3779B97F4A7C15], np.uint64)


def _mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output for each state."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


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
    """Return the indices of all weights but the smallest that have at most `mass` together; the largest always.

    `weights`, float64, sum to 1. Of equal ones the first go first.
    """
    large = np.flatnonzero(weights > mass / len(weights))
    weights = weights[large]
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

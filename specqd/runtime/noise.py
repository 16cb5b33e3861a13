"""The noise of a request: picks a token of a distribution, always the same one at a position."""

from __future__ import annotations

import math
import secrets
from typing import Any, overload

import numpy as np

__all__ = ["Noise"]

_RARE = 2.0**-14
_STEP = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


class Noise:
    """The random numbers of one request: one for each position and token, whenever and however often asked for.

    A level that picks by the noise of a position picks the same token from the same distribution in a pass of any
    size, and two levels whose distributions are near mostly pick the same one. Drafts are then checked by equality,
    and sampled output is the same with speculation as without.

    The numbers are those of SplitMix64 (Steele et al. 2014), begun anew for each position: token i takes the number
    i + 1 of its sequence, and number 0 serves all rare tokens together.
    """

    def __init__(self, seed: int | None) -> None:
        self._begin = _mixed((secrets.randbits(64) if seed is None else seed) + _STEP)

    def pick(self, weights: np.ndarray, position: int, tokens: np.ndarray | None = None) -> int:
        """Return one of `tokens`, by default 0, 1, ..., with chances in proportion to `weights`, float, 0 or more.

        It is the argmax of log p + g with Gumbel noise g. Tokens that are rarer than 2^-14 compete as one with the sum
        of their probabilities, since most are of a large vocabulary and few are ever picked; if that one wins, they
        compete among themselves.
        """
        begin = _mixed(self._begin + (position + 1) * _STEP)
        total = float(weights.sum())
        rare = _RARE * total

        def first(places: np.ndarray, p: np.ndarray) -> tuple[int, float]:
            return _first(places if tokens is None else tokens[places], p, begin)

        likely = np.flatnonzero(weights > rare)
        p = weights[likely] / np.float64(total)
        chosen, race = first(likely, p) if len(likely) else (-1, math.inf)
        rest = 1.0 - float(p.sum())
        if rest > 0 and -math.log1p(-_uniform(_mixed(begin))) < race * rest:
            places = np.flatnonzero((weights > 0) & (weights <= rare))
            if len(places):
                chosen, _ = first(places, weights[places] / np.float64(total))
        return chosen


def _first(tokens: np.ndarray, p: np.ndarray, begin: int) -> tuple[int, float]:
    """Return which token comes first, and when: the smallest -log(1 - u) / p is the largest log p + g."""
    steps = tokens.astype(np.uint64)
    steps += np.uint64(1)
    steps *= np.uint64(_STEP)
    steps += np.uint64(begin)
    races = np.log1p(-_uniform(_mixed(steps)))
    races /= p
    first = int(races.argmax())
    return int(tokens[first]), -float(races[first])


@overload
def _mixed(state: int) -> int: ...
@overload
def _mixed(state: np.ndarray) -> np.ndarray: ...
def _mixed(state: Any) -> Any:
    """SplitMix64's output for each state: a number (whose bits beyond 64 are dropped), or an array of uint64."""
    if isinstance(state, int):
        state &= _WORD
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _WORD
        return state ^ (state >> 31)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@overload
def _uniform(bits: int) -> float: ...
@overload
def _uniform(bits: np.ndarray) -> np.ndarray: ...
def _uniform(bits: Any) -> Any:
    """A number strictly between 0 and 1 of the upper 52 of 64 bits, since 53 could round to 1."""
    if isinstance(bits, int):
        return ((bits >> 12) + 0.5) / 2**52
    # As the mantissa of a number from 1 to 2: converting integers takes twenty times as long.
    return ((bits >> np.uint64(12)) | np.uint64(0x3FF0000000000000)).view(np.float64) - (1 - 2.0**-53)

"""R-KV (arXiv 2505.24133): important tokens that do not repeat what others say."""

from __future__ import annotations

from typing import cast

import numpy as np

from specqd.errors import InputError
from specqd.selection.key_diff import unit
from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed
from specqd.selection.snapkv import pooled

__all__ = ["RKV", "redundancy"]

_COLUMNS = (64, 512)  # of the matrix of cosines that are held at a time: at first, and at most


class RKV(Method):
    """Attention received, less a token's redundancy (section 3): mix * importance - (1 - mix) * redundancy.

    Attributes:
        mix: how much importance counts, from 0 to 1.
        threshold: the cosine above which two keys are alike.
        kernel: tokens over which importance is pooled by its maximum, odd.
    """

    name = "r-kv"
    needs = ("keys", "received")
    mix: float = 0.1
    threshold: float = 0.5
    kernel: int = 7

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.mix <= 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(
                f"r-kv cannot use mix {self.mix} and kernel {self.kernel}; mix is from 0 to 1, kernel odd"
            )

    def score(self, observed: Observed) -> Floats:
        """Return the mixture."""
        importance = pooled(observed.received, self.kernel, "max")
        repeated = redundancy(cast(Floats, observed.keys), self.threshold)
        return np.float32(self.mix) * importance - np.float32(1 - self.mix) * repeated


def redundancy(keys: Floats, threshold: float) -> Floats:
    """Return float32 [kv_heads, T], each row a softmax: how much a key [kv_heads, T, D] is like the others.

    Before the softmax it is the mean cosine to all keys, without itself and without those that have it as their
    newest like key: of a set of repetitions the newest is not held redundant.
    """
    length = keys.shape[1]
    means = np.empty(keys.shape[:2], np.float32)
    for head, directions in enumerate(unit(keys)):
        total = directions @ directions.sum(axis=0) - (directions * directions).sum(axis=1)
        # Most keys have a like one among the newest, so little of the matrix of cosines is ever needed.
        left, end, (width, most) = np.arange(length), length, _COLUMNS
        while end and len(left):
            begin = max(0, end - width)
            cosines = directions[left] @ directions[begin:end].T
            own = np.flatnonzero((left >= begin) & (left < end))
            cosines[own, left[own] - begin] = 0
            like = cosines > threshold
            some = like.any(axis=1)
            newest = end - begin - 1 - like[some, ::-1].argmax(axis=1)
            np.subtract.at(total, begin + newest, cosines[some, newest])
            left, end, width = left[~some], begin, min(2 * width, most)
        means[head] = total / length
    shares = np.exp(means - means.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)

"""SnapKV (arXiv 2404.14469): what the last queries attend to, and the neighbours of that."""

from __future__ import annotations

from typing import Literal

import numpy as np

from specqd.errors import InputError
from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["SnapKV", "pooled"]


class SnapKV(Method):
    """Attention received from the last queries, pooled over neighbouring tokens so that their context stays too.

    The observation window itself is not pooled into the rest: its share of attention says that it is near.

    Attributes:
        kernel: how many tokens are pooled, odd.
        pooling: `mean` or `max` of them.
    """

    name = "snapkv"
    needs = ("received",)
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.kernel < 1 or self.kernel % 2 == 0 or self.pooling not in ("mean", "max"):
            raise InputError(
                f"snapkv cannot take the {self.pooling!r} over {self.kernel} tokens; pooling is mean or max, kernel odd"
            )

    def score(self, observed: Observed) -> Floats:
        """Return the pooled attention; the window's tokens score above all others (section 4.1)."""
        before = pooled(observed.received[:, : observed.length - observed.window], self.kernel, self.pooling)
        scores = np.full(observed.received.shape, before.max(initial=0) + 1, np.float32)
        scores[:, : before.shape[1]] = before
        return scores


def pooled(scores: Floats, kernel: int, pooling: Literal["mean", "max"]) -> Floats:
    """Pool float32 [rows, T] over `kernel` neighbours, with zeros beyond the ends."""
    rows, length = scores.shape
    padded = np.zeros((rows, length + kernel - 1), np.float32)
    padded[:, kernel // 2 : kernel // 2 + length] = scores
    # A sweep for each neighbour is several times as fast as a reduction over a short last axis.
    out = np.zeros_like(scores) if pooling == "mean" else scores.copy()
    for place in range(kernel):
        shifted = padded[:, place : place + length]
        (np.add if pooling == "mean" else np.maximum)(out, shifted, out=out)
    return out / np.float32(kernel) if pooling == "mean" else out

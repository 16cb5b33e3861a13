"""Expected Attention (arXiv 2510.00636): what queries still to come would attend to, if they are Gaussian."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from specqd.errors import InputError
from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["ExpectedAttention"]


class ExpectedAttention(Method):
    """The expected weight exp(s k.m + s^2 k.C k / 2) of a key, normalised, times the norm of its value.

    m and C are mean and covariance of the last queries before RoPE, turned by RoPE's mean over the positions to come;
    s is the scale of attention. The first tokens, which draw attention anyway, are left out of the normalisation.

    Attributes:
        future: positions to come that count.
        sinks: first tokens that are left out, and score above all others.
    """

    name = "expected-attention"
    needs = ("keys", "values", "queries", "rope")
    future: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        """Check the options."""
        if self.future < 1 or self.sinks < 0:
            raise InputError(
                f"expected-attention cannot look at {self.future} positions behind {self.sinks} sinks; "
                "give a future of 1 or more and sinks of 0 or more"
            )

    def score(self, observed: Observed) -> Floats:
        """Return the expected weights, mean over the group."""
        keys = cast(Floats, observed.keys)[:, None, self.sinks :]
        values = cast(Floats, observed.values)[:, self.sinks :]
        mean, covariance = self._statistics(observed)
        products = (keys @ mean[..., None])[..., 0] * observed.scale
        products += ((keys @ covariance) * keys).sum(axis=-1) * (observed.scale**2 / 2)
        weights = np.exp(products - products.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        scores = weights.mean(axis=1) * np.linalg.norm(values, axis=-1)
        above = scores.max(initial=0) + 1
        return np.pad(scores, ((0, 0), (self.sinks, 0)), constant_values=above).astype(np.float32)

    def _statistics(self, observed: Observed) -> tuple[Floats, Floats]:
        """Return mean [kv_heads, group, D] and covariance [kv_heads, group, D, D] of the queries to come."""
        rope, queries = cast(Floats, observed.rope), cast(Floats, observed.queries)
        turned = np.concatenate([queries[..., len(rope) :], -queries[..., : len(rope)]], axis=-1)
        at = observed.positions[:, None, -observed.window :, None] * np.concatenate([rope, rope])
        before = np.cos(at) * queries + np.sin(at) * turned
        mean = before.mean(axis=2)
        centred = before - mean[:, :, None]
        covariance = centred.swapaxes(-1, -2) @ centred / observed.window
        mean_turn = _mean_turn(rope, int(observed.positions[:, -1].max()) + 1, self.future)
        return (mean @ mean_turn.T).astype(np.float32), (mean_turn @ covariance @ mean_turn.T).astype(
            np.float32
        )


def _mean_turn(rope: Floats, begin: int, count: int) -> npt.NDArray[np.float64]:
    """Return RoPE's matrix [D, D], mean over `count` positions from `begin`."""
    angles = np.arange(begin, begin + count)[:, None] * rope.astype(np.float64)
    cosines, sines = np.diag(np.cos(angles).mean(axis=0)), np.diag(np.sin(angles).mean(axis=0))
    return np.block([[cosines, -sines], [sines, cosines]])

"""Random: the control that any method must beat."""

from __future__ import annotations

import numpy as np

from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["Uniform"]


class Uniform(Method):
    """Each token of each head draws a lot once, so that later selections do not favour new tokens.

    Attributes:
        seed: another seed draws other lots.
    """

    name = "random"
    seed: int = 0

    def score(self, observed: Observed) -> Floats:
        """Return the lots, uniform in [0, 1)."""
        # Filled position by position: a longer text does not change the lots of its beginning.
        shape = (int(observed.positions.max()) + 1, observed.heads)
        lots = np.random.default_rng([self.seed, observed.layer]).random(shape, np.float32)
        return lots[observed.positions, np.arange(observed.heads)[:, None]]

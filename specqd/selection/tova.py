"""TOVA (arXiv 2401.06104): what the newest token attends to."""

from __future__ import annotations

import numpy as np

from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["TOVA"]


class TOVA(Method):
    """The newest query's attention, mean over all heads: every head of a layer keeps the same tokens (section 3.2)."""

    name = "tova"
    needs = ("newest",)

    def score(self, observed: Observed) -> Floats:
        """Return that attention once for each KV head."""
        return np.tile(observed.newest.mean(axis=0), (observed.heads, 1))

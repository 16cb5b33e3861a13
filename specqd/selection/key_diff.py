"""KeyDiff (arXiv 2504.15364): keys unlike the mean key stay. Needs no attention scores."""

from __future__ import annotations

from typing import cast

import numpy as np

from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["KeyDiff", "unit"]


class KeyDiff(Method):
    """Tokens whose keys point away from the mean of all keys' directions are kept."""

    name = "key-diff"
    needs = ("keys",)

    def score(self, observed: Observed) -> Floats:
        """Return minus the cosine between each key and the mean of the unit keys (section 3.2)."""
        directions = unit(cast(Floats, observed.keys))
        anchor = unit(directions.mean(axis=1, keepdims=True))
        return -(directions * anchor).sum(axis=-1)


def unit(vectors: Floats) -> Floats:
    """Scale float32 [..., D] to norm 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))

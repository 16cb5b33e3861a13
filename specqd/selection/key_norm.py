"""Key norm (arXiv 2406.11430): keys of small norm draw much attention. Needs no attention scores."""

from __future__ import annotations

from typing import cast

import numpy as np

from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["KeyNorm"]


class KeyNorm(Method):
    """Tokens whose keys have a small Euclidean norm are kept."""

    name = "key-norm"
    needs = ("keys",)

    def score(self, observed: Observed) -> Floats:
        """Return -|k|."""
        return -np.linalg.norm(cast(Floats, observed.keys), axis=-1)

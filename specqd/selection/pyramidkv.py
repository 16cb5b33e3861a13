"""PyramidKV (arXiv 2406.02069): as SnapKV, with more tokens in lower layers than in higher ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specqd.errors import InputError
from specqd.selection.snapkv import SnapKV

__all__ = ["PyramidKV"]


class PyramidKV(SnapKV):
    """SnapKV's scores; the layers' budgets fall linearly from the first to the last.

    Attributes:
        beta: the last layer chooses `mean / beta` tokens; the larger, the steeper.
    """

    name = "pyramidkv"
    beta: float = 20.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.beta < 1:
            raise InputError(f"pyramidkv's beta is {self.beta}; give 1 (the same for all layers) or more")

    def shares(self, layers: int, mean: float, most: float) -> Sequence[float]:
        """Return the falling budgets (section 4.2); if the first layer cannot use its own, the slope is less."""
        last = max(mean / self.beta, 2 * mean - most)
        return list(np.linspace(2 * mean - last, last, layers)) if layers > 1 else [mean]

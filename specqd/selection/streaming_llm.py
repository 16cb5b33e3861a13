"""StreamingLLM (arXiv 2309.17453): nothing but the first and the newest tokens."""

from __future__ import annotations

import numpy as np

from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["StreamingLLM"]


class StreamingLLM(Method):
    """The later a token stands in the text, the rather it is kept."""

    name = "streaming-llm"

    def score(self, observed: Observed) -> Floats:
        """Return the positions."""
        return observed.positions.astype(np.float32)

"""H2O (arXiv 2306.14048): heavy hitters, tokens that have received much attention so far."""

from __future__ import annotations

from specqd.selection.method import Method
from specqd.selection.observed import Floats, Observed

__all__ = ["H2O"]


class H2O(Method):
    """Attention received, summed over all selections so far.

    The paper sums over every query of the text. Here each selection adds the mean over the queries it sees: reading
    the whole attention matrix would cost several times the prefill.
    """

    name = "h2o"
    needs = ("received",)

    def score(self, observed: Observed) -> Floats:
        """Return the running sum."""
        return observed.received if observed.carried is None else observed.carried + observed.received

    def carry(self, observed: Observed) -> Floats:
        """Return the running sum."""
        return self.score(observed)

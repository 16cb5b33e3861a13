"""How a level chooses tokens, and how it checks those that were proposed to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specqd.runtime.output import Output

__all__ = ["Choice", "Chooser", "Greedy"]


@dataclass(slots=True)
class Choice:
    """A token, and the distribution (float64 `[vocab]`) it was drawn from; None: it was certain."""

    token: int
    distribution: np.ndarray | None = None


class Chooser(Protocol):
    """Turns the rows of a pass into tokens; the same for every level of a chain."""

    def verify(self, output: Output, first: int, text: list[int], drafts: Sequence[Choice]) -> list[Choice]:
        """Check `drafts`, proposed after `text`, against rows `first`, `first + 1`, ... of a pass.

        Returns the drafts that stand, and one token more: in place of the first that does not, or after all.
        Each is distributed as if drawn from its row alone, whatever the drafts were.
        """
        ...


class Greedy:
    """The most likely token, always."""

    def verify(self, output: Output, first: int, text: list[int], drafts: Sequence[Choice]) -> list[Choice]:
        """Keep the longest prefix of drafts that the rows choose too."""
        new = []
        for i in range(len(drafts) + 1):
            new.append(Choice(output.token(first + i)))
            if i < len(drafts) and drafts[i].token != new[-1].token:
                break
        return new

"""Where zeros may be: anywhere, N of every M kept, or whole blocks; and the choice of zeros by scores."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from specqd.errors import InputError

__all__ = ["Pattern", "keep_n_of_m", "smallest", "smallest_of_rows"]


@dataclass(frozen=True)
class Pattern:
    """The form of zeros in a matrix [groups, rows, K].

    Attributes:
        kept: of every `of` neighbouring columns; 0 where any number of blocks may be zero.
        of: see `kept`.
        rows: of a block, which is zero as a whole or not at all.
        columns: of a block.
    """

    kept: int = 0
    of: int = 1
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `any`, `2:4` (two of four kept) or `16x1` (blocks of 16 rows); raises InputError for another text."""
        found = re.fullmatch(r"([1-9]\d*)([:x])([1-9]\d*)", text)
        if text == "any":
            return cls()
        first, second = (int(found[1]), int(found[3])) if found else (0, 0)
        if found and found[2] == "x":
            return cls(rows=first, columns=second)
        if 0 < first < second:
            return cls(first, second)
        raise InputError(
            f"the pattern {text!r} is none: give any, N:M with N below M such as 2:4, or a block such as 1x4"
        )

    def fault(self, rows: int, channels: int) -> str | None:
        """Say why a layer of so many rows and input channels a group cannot have this pattern, or nothing."""
        if channels % self.of or channels % self.columns:
            return f"its {channels} input channels a group are no multiple of {max(self.of, self.columns)}"
        return (
            f"its {rows} output channels a group are no multiple of {self.rows}" if rows % self.rows else None
        )

    def units(self, scores: Tensor) -> Tensor:
        """Sum scores [groups, rows, K] over each block: [groups, rows / r, K / c]."""
        if self.rows == self.columns == 1:
            return scores
        blocks = scores.unflatten(1, (-1, self.rows)).unflatten(3, (-1, self.columns))
        return blocks.sum((2, 4))

    def spread(self, units: Tensor) -> Tensor:
        """Give each element of a block what the block has: the inverse of `units` in shape."""
        return units.repeat_interleave(self.rows, -2).repeat_interleave(self.columns, -1)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores, the first ones where several are equal; bool of the same shape."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = flat.kthvalue(count).values  # sorting all takes four times as long
    marked = flat < threshold
    marked[(flat == threshold).nonzero()[: count - int(marked.sum()), 0]] = True
    return marked.reshape(scores.shape)


def smallest_of_rows(scores: Tensor, count: int) -> Tensor:
    """Mark `count` scores, as many in every row [..., K], or one more in those whose next score is smallest."""
    rows = scores.reshape(-1, scores.shape[-1])
    order = torch.argsort(rows, dim=1, stable=True)
    base, more = divmod(count, len(rows))
    marked = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, :base], True)
    if more:
        following = order[:, base]
        chosen = torch.argsort(rows.gather(1, following[:, None])[:, 0], stable=True)[:more]
        marked[chosen, following[chosen]] = True
    return marked.reshape(scores.shape)


def keep_n_of_m(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mark all but the `kept` largest scores of every `of` neighbours; of equal ones the last stay."""
    groups = scores.unflatten(-1, (-1, pattern.of))
    order = torch.argsort(groups, dim=-1, stable=True)[..., : pattern.of - pattern.kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)

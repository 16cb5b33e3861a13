"""Ranges of activations on calibration data, from a stream: the least and the largest value, or less by a histogram."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Literal

import torch
from torch import Tensor, fx

from specqd.passes.contract import Progress
from specqd.program import Entry, Program

from .affine import Affine, affine
from .watching import watched

__all__ = ["Choice", "Ranges"]

Ranges = Literal["minmax", "percentile", "mse"]

_BINS = 2048
_SHARES = [share / 100 for share in range(20, 101)]


@dataclass
class _Seen:
    """What was seen of the values of a group of tensors."""

    least: float = inf
    most: float = -inf
    fit: bool = True
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))

    def extend(self, x: Any) -> None:
        self.fit = self.fit and isinstance(x, Tensor) and x.dtype is torch.float32
        if not self.fit or not x.numel():
            return
        least, most = (float(v) for v in x.aminmax())
        self.fit = isfinite(least) and isfinite(most)
        self.least, self.most = min(self.least, least), max(self.most, most)

    def count(self, x: Tensor) -> None:
        if self.least < self.most:
            self.counts += torch.histc(x.flatten(), _BINS, self.least, self.most).double().cpu()


@dataclass(frozen=True)
class Choice:
    """How ranges are chosen of what is seen.

    1. `minmax`: all of it.
    2. `percentile`: without the values below the lowest and above the highest `100 - percentile` percent.
    3. `mse`: the share of it that has the least mean squared error when it is quantised.
    """

    ranges: Ranges
    percentile: float
    symmetric: bool

    def of(
        self,
        program: Program,
        entry: Entry,
        groups: Sequence[tuple[fx.Node, ...]],
        batches: Collection[tuple[Any, ...]],
    ) -> Generator[Progress, None, dict[fx.Node, Affine]]:
        """Return how each node's value is quantised; those of a group share a range.

        Left out are groups with a value that is not float32, or is NaN or infinite somewhere.
        """
        found = {node: seen for group in groups for seen in [_Seen()] for node in group}
        yield from watched(
            program, entry, batches, "finding ranges", found, lambda node, x, _: found[node].extend(x)
        )
        found = {node: one for node, one in found.items() if one.fit and one.least <= one.most}
        if self.ranges != "minmax":
            yield from watched(
                program, entry, batches, "counting values", found, lambda node, x, _: found[node].count(x)
            )
        chosen = {id(one): affine(*self._range(one), symmetric=self.symmetric) for one in found.values()}
        return {node: chosen[id(one)] for node, one in found.items()}

    def _range(self, seen: _Seen) -> tuple[float, float]:
        if self.ranges == "minmax" or seen.least == seen.most:
            return seen.least, seen.most
        edges = torch.linspace(seen.least, seen.most, _BINS + 1, dtype=torch.float64)
        if self.ranges == "percentile":
            below = seen.counts.cumsum(0) / seen.counts.sum()
            outside = 1 - self.percentile / 100
            first, last = (int((below <= share).sum()) for share in (outside, 1 - outside - 1e-12))
            return float(edges[first]), float(edges[min(last, _BINS - 1) + 1])
        middles = ((edges[1:] + edges[:-1]) / 2).float()

        def error(share: float) -> float:
            rounded = affine(seen.least * share, seen.most * share, symmetric=self.symmetric).rounded(middles)
            return float(((rounded - middles).double().square() * seen.counts).sum())

        best = min(reversed(_SHARES), key=error)
        return seen.least * best, seen.most * best

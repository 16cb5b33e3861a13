"""How many zeros each layer gets by what they do to its outputs, so that all errors together are least.

Layers are searched one by one, as by Li et al. (arXiv 1608.08710, section 3.2), but by errors of outputs, which need no
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .least_squares import output_error
from .pattern import Pattern, smallest

__all__ = ["LEVELS", "errors_at_levels", "units_of_least_error"]

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Shares of a layer's units at which it is searched."""


def errors_at_levels(matrix: Tensor, scores: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Return the squared error of a layer's outputs by their variance, where its smallest units are zero.

    Means are left out of both, as a bias makes good for them.

    Args:
        matrix: [groups, rows, K].
        scores: of the same shape; the units with the least sums of them become zero.
        gram: float64 [groups, K + 1, K + 1].
        pattern: what a unit is.

    Returns:
        float64 [len(LEVELS)].
    """
    sums = gram[:, :-1, -1:]
    spread = gram[:, :-1, :-1] - sums @ sums.mT / gram[:, -1:, -1:].clamp_min(1)
    units = pattern.units(scores)
    gone = [pattern.spread(smallest(units, round(level * units.numel()))) for level in LEVELS]
    errors = torch.stack([output_error(matrix * zeros, spread) for zeros in gone])
    return (errors / errors[-1].clamp_min(1e-300)).clamp_min(0)


def units_of_least_error(sparsity: float, sizes: Sequence[int], errors: Sequence[Tensor]) -> list[int]:
    """Return how many units of each layer to prune, so that the sum of their errors is least.

    Errors are taken as convex in the share (their lower convex hull) and straight between levels; then it is best to
    take what adds least error for a unit, wherever that is, until there are enough.

    Args:
        sparsity: the share of all units to prune, in [0, 1).
        sizes: of each layer, how many units it has.
        errors: of each layer, as `errors_at_levels` gives them.
    """
    wanted = sparsity * sum(sizes)
    pieces = sorted(
        (rise / width, at, width)
        for at, (size, of_layer) in enumerate(zip(sizes, errors, strict=True))
        for width, rise in _convex(
            [(level * size, float(e)) for level, e in zip(LEVELS, of_layer, strict=True)]
        )
    )
    counts = [0.0] * len(sizes)
    for _, at, width in pieces:
        taken = min(width, wanted)
        counts[at], wanted = counts[at] + taken, wanted - taken
    return [round(count) for count in counts]


def _convex(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return width and rise of each piece of the lower convex hull of points, which go from left to right."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(hull)]

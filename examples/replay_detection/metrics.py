"""Errors of detectors: equal error rate by the convex hull of the ROC, its confidence interval, least t-DCF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from specqd.errors import InputError

__all__ = ["Costs", "bootstrap", "eer", "errors", "min_tdcf"]


def errors(genuine: Sequence[float], spoof: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the miss rate of genuine and the false acceptance of spoofed trials at each threshold, from the lowest.

    A trial is accepted if its score is at least the threshold; equal scores are accepted or rejected together.

    Raises:
        InputError: there is no trial of a kind, or a score is no number.
    """
    kinds = [np.asarray(scores, np.float64) for scores in (genuine, spoof)]
    for name, scores in zip(("genuine", "spoofed"), kinds, strict=True):
        if not len(scores):
            raise InputError(f"there are no {name} trials; an error rate needs both kinds")
        if np.isnan(scores).any():
            raise InputError(f"{np.isnan(scores).sum()} of the scores of {name} trials are NaN")
    thresholds = np.append(np.unique(np.concatenate(kinds)), np.inf)
    below = [np.searchsorted(np.sort(scores), thresholds) / len(scores) for scores in kinds]
    return below[0], 1 - below[1]


def eer(genuine: Sequence[float], spoof: Sequence[float]) -> float:
    """Return where the convex hull of the ROC has equal errors, in [0, 0.5] (Bruemmer and de Villiers, BOSARIS)."""
    miss, accepted = errors(genuine, spoof)
    hull: list[tuple[float, float]] = []
    for point in zip(accepted[::-1], miss[::-1], strict=True):  # from nothing accepted to all
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    for (x0, y0), (x1, y1) in pairwise(hull):
        if y1 - x1 <= 0:
            along = (y0 - x0) / ((y0 - x0) - (y1 - x1))
            return float(x0 + along * (x1 - x0))
    return 0.0


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether `b` lies on or above the line from `a` to `c`, so that the hull from below leaves it out."""
    return bool((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) <= 0)


def bootstrap(
    genuine: Sequence[float],
    spoof: Sequence[float],
    groups: Sequence[Sequence[str]],
    *,
    draws: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % interval of the equal error rate over draws of groups with replacement.

    `groups` say of the genuine and of the spoofed trials what must be drawn together: recordings of one utterance
    depend on each other.
    """
    rng = np.random.default_rng(seed)
    kinds = [np.asarray(scores, np.float64) for scores in (genuine, spoof)]
    names = sorted(set(groups[0]) | set(groups[1]))
    numbers = {name: i for i, name in enumerate(names)}
    member = [np.array([numbers[name] for name in of]) for of in groups]
    found = []
    while len(found) < draws:
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        drawn = [np.repeat(scores, times[of]) for scores, of in zip(kinds, member, strict=True)]
        if all(map(len, drawn)):
            found.append(eer(*drawn))
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


@dataclass(frozen=True)
class Costs:
    """Priors, costs, and the errors of the speaker verification behind the detector (Kinnunen et al., 1804.09618).

    Attributes:
        target, nontarget, spoof: priors of who asks.
        asv_miss, asv_accept, asv_miss_spoof: rates of targets rejected, others accepted, replays rejected.
        asv_miss_cost, asv_accept_cost, miss_cost, accept_cost: what an error of the verifier and of the detector costs.
    """

    target: float = 0.9405
    nontarget: float = 0.0095
    spoof: float = 0.05
    asv_miss: float = 0.05
    asv_accept: float = 0.05
    asv_miss_spoof: float = 0.5
    asv_miss_cost: float = 1.0
    asv_accept_cost: float = 10.0
    miss_cost: float = 1.0
    accept_cost: float = 10.0


def min_tdcf(genuine: Sequence[float], spoof: Sequence[float], costs: Costs = Costs()) -> float:
    """Return the least tandem detection cost, divided by that of the better detector that accepts or rejects all."""
    miss, accepted = errors(genuine, spoof)
    c = costs
    c1 = (
        c.target * (c.miss_cost - c.asv_miss_cost * c.asv_miss)
        - c.nontarget * c.asv_accept_cost * c.asv_accept
    )
    c2 = c.accept_cost * c.spoof * (1 - c.asv_miss_spoof)
    if c1 < 0 or c2 < 0:
        raise InputError(
            f"these costs make errors of the detector worth while (C1 = {c1:.3g}, C2 = {c2:.3g})"
        )
    return float(np.min(c1 * miss + c2 * accepted) / min(c1, c2))

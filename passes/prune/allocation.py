"""How many zeros each layer gets, so that all have a given share of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from specqd.errors import InputError

__all__ = ["Allocation", "allocate"]

Allocation = Literal["normalised", "global", "uniform", "erk", "sensitivity"]


def allocate(
    how: Allocation, sparsity: float, magnitudes: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]
) -> list[int]:
    """Return how many units of each layer to prune; a unit is a weight, or a block of them.

    1. `normalised`: the smallest units of all layers, each layer's magnitudes divided by their L2 norm (Lazarevich et
       al., arXiv 2104.15023). Small layers stay denser.
    2. `global`: the smallest units of all layers.
    3. `uniform`: the same share of each layer.
    4. `erk`: a density in proportion to sum(shape) / prod(shape), and layers for which that is above 1 stay dense (Evci
       et al., arXiv 1911.11134).

    Args:
        how: one of the above; `sensitivity` needs data, see specqd.passes.prune.sensitivity.
        sparsity: the share of units to prune, in [0, 1).
        magnitudes: of each layer, the L2 norm of each unit, of any shape.
        shapes: of each layer, the weight's.

    Raises:
        InputError: `erk` cannot reach a sparsity that low.
    """
    sizes = [m.numel() for m in magnitudes]
    if how == "uniform":
        return [round(sparsity * size) for size in sizes]
    if how == "erk":
        return [
            round((1 - density) * size)
            for density, size in zip(_erk(sparsity, sizes, shapes), sizes, strict=True)
        ]
    scales = [float(m.norm()) if how == "normalised" else 1.0 for m in magnitudes]
    scaled = [m.reshape(-1) / (scale or 1.0) for m, scale in zip(magnitudes, scales, strict=True)]
    wanted = round(sparsity * sum(sizes))
    if not wanted:
        return [0] * len(sizes)
    threshold = torch.cat(scaled).kthvalue(wanted).values
    counts = [int((m < threshold).sum()) for m in scaled]
    missing = wanted - sum(counts)
    for at, m in enumerate(scaled):
        equal = min(missing, int((m == threshold).sum()))
        counts[at], missing = counts[at] + equal, missing - equal
    return counts


def _erk(sparsity: float, sizes: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[float]:
    shares = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        rest = [at for at in range(len(sizes)) if at not in dense]
        kept = (1 - sparsity) * sum(sizes) - sum(sizes[at] for at in dense)
        if not rest or kept < 0:
            raise InputError(
                f"allocation=erk cannot reach a sparsity of {sparsity}: the layers it keeps dense weigh more"
            )
        scale = kept / sum(shares[at] * sizes[at] for at in rest)
        above = [at for at in rest if scale * shares[at] > 1 + 1e-12]
        if not above:
            return [1.0 if at in dense else scale * shares[at] for at in range(len(sizes))]
        dense.update(above)

"""Weights of a given support whose products with typical inputs are nearest to those of dense weights.

The layer-wise problem of Lazarevich et al. (arXiv 2104.15023, section 3) in Gram matrices: with D the difference of two
matrices, biases as a last column, the squared error of the outputs is trace(D G D^T). So it needs no activations.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

__all__ = ["adam", "corrected", "output_error", "solve"]


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Return the squared error of all outputs together, float64, for matrices [groups, rows, K + 1] that differ so."""
    wide = difference.double()
    return ((wide @ gram) * wide).sum()


def solve(dense: Tensor, near: Tensor, support: Tensor, gram: Tensor, damping: float) -> Tensor:
    """Return the matrix of that support with the least output error: row by row, by Cholesky factorisation.

    `damping` times the mean of G's diagonal is the price of what weights, but not biases, are away from `near`,
    squared: it decides where the inputs do not say more, or say it of too few samples.

    Args:
        dense: [groups, rows, K + 1], the biases last; where these are all zero and outside of the support, none.
        near: of the same shape.
        support: bool, of the same shape.
        gram: float64 [groups, K + 1, K + 1].
        damping: more than 0.
    """
    damped = gram.clone()
    diagonal = damped.diagonal(0, 1, 2)[:, :-1]
    added = damping * diagonal.mean(1)
    price = torch.where(added > 0, added, 1)[:, None]
    diagonal += price
    wanted = dense.double() @ gram
    wanted[..., :-1] += price[..., None] * near.double()[..., :-1]
    result = torch.zeros_like(wanted)
    # One row at a time: batches would fill short supports up, and not stay in a cache.
    for group, row in product(range(support.shape[0]), range(support.shape[1])):
        kept = support[group, row].nonzero()[:, 0]
        system = damped[group].index_select(0, kept).index_select(1, kept)
        factor = torch.linalg.cholesky(system)
        result[group, row, kept] = torch.cholesky_solve(wanted[group, row, kept, None], factor)[:, 0]
    return result


def corrected(dense: Tensor, pruned: Tensor, support: Tensor, gram: Tensor) -> Tensor:
    """Return the pruned matrix with each channel's deviation and mean, and with each output's mean, of the dense one.

    1. W <- a W + b on the support, where a gives the row its deviation back, and b its mean. As b is dropped outside of
       the support, the mean comes back in part only.
    2. A bias, where the support has one, then gives the outputs the mean that they had.

    Args:
        dense: [groups, rows, K + 1], the biases last.
        pruned: of the same shape.
        support: bool, of the same shape.
        gram: float64 [groups, K + 1, K + 1].
    """
    old, new = dense.double()[..., :-1], pruned.double()[..., :-1]
    scale = old.std(-1, correction=0, keepdim=True) / (new.std(-1, correction=0, keepdim=True) + 1e-9)
    shift = old.mean(-1, keepdim=True) - (scale * new).mean(-1, keepdim=True)
    new = (scale * new + shift) * support[..., :-1]
    means = gram[:, :-1, -1:] / gram[:, -1:, -1:]
    bias = dense.double()[..., -1:] + (old - new) @ means
    return torch.cat([new, torch.where(support[..., -1:], bias, 0)], -1)


def adam(dense: Tensor, start: Tensor, support: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Return the matrix after steps of Adam on the mean squared error, as the paper's code does them.

    The rates are the paper's, 1e-5 for weights and 1e-4 for biases; the gradient is that of all samples rather than
    of 50 at a time, which their Gram matrix gives exactly.

    Args:
        dense: [groups, rows, K + 1], the biases last.
        start: where to begin, of the same shape.
        support: bool, of the same shape; nothing else changes.
        gram: float64 [groups, K + 1, K + 1].
        steps: how many to take.
    """
    wanted = dense.float()
    mean = (gram / gram[:, -1:, -1:]).float() * (2 / (dense.shape[0] * dense.shape[1]))
    weights, bias = (part.clone() for part in start.float().split([start.shape[-1] - 1, 1], -1))
    optimiser = torch.optim.Adam([{"params": [weights], "lr": 1e-5}, {"params": [bias], "lr": 1e-4}])
    for _ in range(steps):
        gradient = ((torch.cat([weights, bias], -1) - wanted) @ mean) * support
        weights.grad, bias.grad = gradient.split([weights.shape[-1], 1], -1)
        optimiser.step()
    return torch.cat([weights, bias], -1)

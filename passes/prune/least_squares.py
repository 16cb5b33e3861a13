"""Weights of a given support whose products with typical inputs are nearest to those of dense weights.

The layer-wise problem of Lazarevich et al. (arXiv 2104.15023, section 3) in Gram matrices: with D the difference of two
matrices, biases as a last column, the squared error of the outputs is trace(D G D^T). So it needs no activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adam", "corrected", "output_error", "solve"]

_STEPS, _NEAR = 60, 1e-7  # of conjugate gradients; what is left of the squared residual after them
_REFINEMENTS, _EXACT = 4, 1e-6
_TINY = 1e-37


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Return the squared error of all outputs together, float64, for matrices [groups, rows, K + 1] that differ so."""
    wide = difference.double()
    return ((wide @ gram) * wide).sum()


def solve(dense: Tensor, near: Tensor, support: Tensor, gram: Tensor, damping: float) -> Tensor:
    """Return the matrix of that support with the least output error, by conjugate gradients on all rows at once.

    1. `damping` times the mean of G's diagonal is the price of what weights, but not biases, are away from `near`,
       squared: it decides where the inputs do not say more, or say it of too few samples.
    2. The inverse of the whole damped G conditions each row's part of it, so that some 30 steps do: products of
       matrices, where a factorisation for each row would take 3 times as long at half of the weights.
    3. Steps are in float32; what they leave is found in float64, and solved for again until a millionth is left of what
       there was to gain: with A a row's part of G, r A^-1 r, which r (G^-1) r on the support is never below.

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
    # Unknowns are scaled to a diagonal of ones, which float32 can hold whatever the inputs' size.
    scale = damped.diagonal(0, 1, 2).rsqrt()
    scaled = damped * scale[:, :, None] * scale[:, None, :]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled))
    wanted = dense.double() @ gram
    wanted[..., :-1] += price[..., None] * near.double()[..., :-1]
    wanted = wanted * scale[:, None] * support
    result = near.double() / scale[:, None] * support
    gains = []
    for _ in range(_REFINEMENTS):
        rest = (wanted - result @ scaled) * support
        gains.append(((rest @ inverse) * rest).sum(-1))
        if (gains[-1] <= _EXACT * gains[0]).all():
            break
        result += _conjugate_gradients(rest.float(), support, scaled.float(), inverse.float())
    return result * scale[:, None]


def _conjugate_gradients(rest: Tensor, support: Tensor, system: Tensor, inverse: Tensor) -> Tensor:
    """Return x [groups, rows, K] on the support with x `system` = `rest` there, nearly, conditioned by `inverse`."""
    result = torch.zeros_like(rest)
    pressed = (rest @ inverse) * support
    direction, left = pressed, (rest * pressed).sum(-1, keepdim=True)
    enough = _NEAR * left
    for _ in range(_STEPS):
        if (left <= enough).all():
            break
        moved = (direction @ system) * support
        step = left / (direction * moved).sum(-1, keepdim=True).clamp_min(_TINY)
        result, rest = result + step * direction, rest - step * moved
        pressed = (rest @ inverse) * support
        before, left = left, (rest * pressed).sum(-1, keepdim=True)
        direction = pressed + left / before.clamp_min(_TINY) * direction
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

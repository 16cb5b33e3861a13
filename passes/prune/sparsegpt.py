"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): columns make good for the zeros of those before them."""

from __future__ import annotations

import torch
from torch import Tensor

from .pattern import Pattern, keep_n_of_m, smallest

__all__ = ["sparsegpt"]

_BLOCK = 128
"""Columns whose zeros are chosen together, as in the paper."""


def sparsegpt(weight: Tensor, factor: Tensor, count: int, pattern: Pattern) -> Tensor:
    """Return a matrix with zeros, and with the other elements changed so that products with typical inputs stay.

    1. In each block of 128 columns, those units go whose w^2 / U_jj^2 is smallest, as the columns before have left w;
       N of M are chosen when the first of the M columns is reached.
    2. Column j becomes zero where chosen; the error e = (w_j - q_j) / U_jj is taken out of every later column k:
       w_k -= e U_jk.

    Args:
        weight: float32 [rows, K].
        factor: U, float32 [K, K], see specqd.passes.quantize.error_compensation.inverse_factor.
        count: how many units become zero; each block of columns has its share of them.
        pattern: where zeros may be.
    """
    rest, columns = weight.clone(), weight.shape[1]
    size = max(_BLOCK // (width := max(pattern.of, pattern.columns)), 1) * width
    gone = 0
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        block, part = rest[:, begin:end], factor[begin:end, begin:end]
        marked = torch.zeros_like(block, dtype=torch.bool)
        if not pattern.kept:
            upto = round(count * end / columns)
            marked = pattern.spread(smallest(pattern.units(_scores(block, part)[None]), upto - gone))[0]
            gone = upto
        errors = torch.empty_like(block)
        for j in range(end - begin):
            if pattern.kept and j % pattern.of == 0:
                near = slice(j, j + pattern.of)
                marked[:, near] = keep_n_of_m(_scores(block[:, near], part[near, near]), pattern)
            errors[:, j] = block[:, j] * marked[:, j] / part[j, j]
            block[:, j].masked_fill_(marked[:, j], 0)
            block[:, j + 1 :].addr_(errors[:, j], part[j, j + 1 :], alpha=-1)
        rest[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
    return rest


def _scores(block: Tensor, factor: Tensor) -> Tensor:
    return (block / factor.diagonal()) ** 2

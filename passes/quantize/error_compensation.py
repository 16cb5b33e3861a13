"""Error-compensated rounding onto the MXFP4 grid: each column's error is made good by the columns after it.

GPTQ (Frantar et al., arXiv 2210.17323), with a scale chosen for each block of 32 when the rounding reaches it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specqd.errors import InputError

from .mxfp4 import BLOCK, MXFP4, ScaleRule, choose_scales, encode_with, nearest

__all__ = ["compensate", "inverse_factor"]


def compensate(weight: Tensor, factor: Tensor, rule: ScaleRule = "search") -> MXFP4:
    """Cast a weight to MXFP4 so that its products with typical inputs change little, rather than its elements.

    1. Blocks of 32 columns are cast from left to right. A block's scales are chosen by `rule` from the weight
       as the blocks before have left it.
    2. Within a block, column i is rounded, and its error e_i = (w_i - q_i) / U_ii is taken out of every later
       column j: w_j -= e_i U_ij. Later blocks receive that once a block, as one product.
    3. Rows do not influence each other. A row with a NaN or infinity is cast without compensation.
    4. A weight that is on the grid stays as it is, up to the choice of equal encodings.

    Args:
        weight: bfloat16, float16 or float32 [N, K], K a multiple of 32.
        factor: U, float32 [K, K], see `inverse_factor`.
        rule: how a block's scale is chosen, see specqd.passes.quantize.mxfp4.

    Raises:
        InputError: as specqd.passes.quantize.mxfp4.encode, or the factor is not [K, K].
    """
    columns = weight.shape[-1]
    if factor.shape != (columns, columns):
        raise InputError(
            f"a factor {list(factor.shape)} does not belong to a weight {list(weight.shape)}; give one for its "
            f"{columns} inputs"
        )
    scales = choose_scales(weight, rule)
    whole = weight.isfinite().all(1)
    # Transposed, a column of the weight is contiguous.
    rest = weight.detach()[whole].float().T.contiguous()
    chosen = torch.empty((columns // BLOCK, rest.shape[1]), dtype=torch.uint8)
    for number, scale in enumerate(chosen):
        begin, end = number * BLOCK, (number + 1) * BLOCK
        block = rest[begin:end]
        scale.copy_(choose_scales(block.T, rule)[:, 0])
        errors = _round_block(block, scale, factor[begin:end, begin:end])
        rest[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    values = weight.detach().float().clone()
    values[whole], scales[whole] = rest.T, chosen.T
    return encode_with(values, scales)


def _round_block(block: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Round the rows of `block` [32, N] in place, at `scale` [N]; return their errors e [32, N]."""
    errors = torch.empty_like(block)
    for i, (row, error) in enumerate(zip(block, errors, strict=True)):
        rounded = nearest(row, scale)
        torch.sub(row, rounded, out=error).div_(factor[i, i])
        row.copy_(rounded)
        block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return errors


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U = (G + damping * mean(diag G) * I)^-1, float32 [K, K].

    1. An input that was always zero takes no part: its row and column of U are those of the identity.
    2. The mean is over the other inputs.

    Args:
        gram: G = X^T X over rows X of inputs, float32 or float64 [K, K].
        damping: more than 0; small values trust the Gram matrix more.

    Raises:
        InputError: the Gram matrix is not finite, or not positive definite even when damped.
    """
    damped = gram.double()
    if not damped.isfinite().all():
        raise InputError("the Gram matrix holds NaN or infinity; the inputs it was made of are not finite")
    diagonal = damped.diagonal().clone()
    dead = diagonal <= 0
    if dead.all():
        return torch.eye(len(damped), device=gram.device)
    damped = damped.masked_fill(dead[:, None] | dead, 0)
    diagonal += damping * diagonal[~dead].mean()
    damped.diagonal().copy_(diagonal.masked_fill(dead, 1))
    # H = R R^T with R upper triangular, by a Cholesky factorisation of H turned upside down; then U = R^-1.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise InputError(
            f"the Gram matrix is not positive definite with a damping of {damping}; give a larger one"
        )
    identity = torch.eye(len(damped), dtype=torch.float64, device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()

"""fuse-normalisations: one operator for layer and RMS normalisation that is written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from specqd.program import Entry, Program

from .contract import Pass, Refusal
from .rules import Rule, apply

__all__ = ["FuseNormalisations"]


class FuseNormalisations(Pass):
    """Fuse normalisation over the last dimension, as it may be written out.

        d = x - mean(x, -1, keepdim)
        d / sqrt(mean(d * d, -1, keepdim) + eps) * weight + bias  ->  layer_norm(x, [n], weight, bias, eps)
        x / sqrt(mean(x * x, -1, keepdim) + eps) * weight         ->  rms_norm(x, [n], weight, eps)

    1. Squares are d * d or d ** 2; the mean of them may be var(x) without correction, or var(d).
    2. Instead of the division there may be a product with rsqrt.
    3. The weight and the bias may be missing, the bias alone too.

    Sums are those of the parts but for their order, for how the variance is taken, and that those of half precision are
    taken in float32. Refused: weights that are no vector of the last dimension, values inside that others read too, and
    what is such a norm to the half and then is not. Language models have fuse-rms-norm, whose operator their kernels
    know.
    """

    name = "fuse-normalisations"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Try each way to write it, those with weights first."""
        yield from apply(program, entry, _RULES)


_Function = Callable[[Tensor], Tensor]


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


# The mean of squares of differences d = x - mean(x), as it may be written; d of RMS normalisation is x itself.
_SQUARES: tuple[_Function, ...] = (lambda d: _mean(d * d), lambda d: _mean(d**2))
_VARIANCES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    *(lambda x, d, of=of: of(d) for of in _SQUARES),
    lambda x, d: x.var(-1, keepdim=True, unbiased=False),
    lambda x, d: d.var(-1, keepdim=True, unbiased=False),
)
_DIVISIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda d, square: d / torch.sqrt(square),
    lambda d, square: d * torch.rsqrt(square),
)
_AFFINE: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda y, weight, bias: y * weight + bias,
    lambda y, weight, bias: y * weight,
    lambda y, weight, bias: y,
)
_LIKE = (*(torch.empty(2, 3, 8, device="meta"),), *(torch.empty(8, device="meta") for _ in range(2)))


def _no_vector(x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> str | None:
    for what, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            return f"its {what} is {list(vector.shape)}, not a vector of {x.shape[-1]}"
    return None


def _layer_norm(affine: Any, divided: Any, variance: Any) -> Rule:
    def before(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        d = x - _mean(x)
        return affine(divided(d, variance(x, d) + eps), weight, bias)

    def after(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    return Rule(before, after, _LIKE, _no_vector)


def _rms_norm(affine: Any, divided: Any, square: Any) -> Rule:
    def before(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return affine(divided(x, square(x) + eps), weight, bias)

    def after(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    return Rule(before, after, _LIKE, _no_vector)


_RULES = (
    *(_layer_norm(*ways) for ways in product(_AFFINE, _DIVISIONS, _VARIANCES)),
    *(_rms_norm(*ways) for ways in product(_AFFINE[1:], _DIVISIONS, _SQUARES)),
)

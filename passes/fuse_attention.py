"""fuse-attention: one operator for scaled dot-product attention that is written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from specqd.program import Entry, Program

from .contract import Pass, Refusal
from .rules import Rule, apply

__all__ = ["FuseAttention"]


class FuseAttention(Pass):
    """Fuse attention over the last two of three or four dimensions, however it is scaled and masked.

        softmax(q @ k^T * scale + mask, -1) @ v  ->  scaled_dot_product_attention(q, k, v, mask, scale=scale)

    1. The scale multiplies or divides scores or queries, or multiplies keys; without one it is 1.
    2. The mask is added to scores, or a number of at most -1e9 is filled in where it is true; or there is none. The
       number is added too: beside it, scores below 32 vanish.
    3. The softmax may be asked for in float32.
    4. Of three dimensions, the first is taken for heads.

    Sums are those of the parts but for their order; a row of scores that are all -inf gives zeros in the place of NaN.
    Refused: other dtypes than float32, larger numbers that are filled in, masks that make more scores, values inside
    that others read too, queries, keys and values of unlike batches or heads, and what is attention to the half and
    then is not.
    """

    name = "fuse-attention"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Try each way to write it."""
        yield from apply(program, entry, _RULES)


Scores = Callable[[Tensor, Tensor, float], Tensor]
Masking = Callable[[Tensor, Tensor, float], Tensor]


def _summand(mask: Tensor, number: float) -> Tensor:
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, number)


# How scores may be written, and the scale that this is.
_SCORES: tuple[tuple[Scores, Callable[[float], float]], ...] = (
    (lambda q, k, by: q @ k * by, lambda by: by),
    (lambda q, k, by: q @ k / by, lambda by: 1 / by),
    (lambda q, k, by: (q * by) @ k, lambda by: by),
    (lambda q, k, by: (q / by) @ k, lambda by: 1 / by),
    (lambda q, k, by: q @ (k * by), lambda by: by),
    (lambda q, k, by: q @ k, lambda by: 1.0),
)
# How they may be masked, and the mask that is to be added.
_MASKS: tuple[tuple[Masking, Callable[..., Tensor | None]], ...] = (
    (lambda scores, mask, number: scores, lambda mask, number: None),
    (lambda scores, mask, number: scores + mask, lambda mask, number: mask),
    (lambda scores, mask, number: scores.masked_fill(mask, number), _summand),
)
_HIDING = -1e9  # neighbours in float32 are 64 apart there
_Q, _K, _V = (torch.empty(2, 3, *sizes, device="meta") for sizes in ((4, 8), (8, 5), (5, 8)))
_ADDED, _HIDDEN = (torch.empty(4, 5, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bool))


def _unsuitable(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, by: float | None, number: float | None
) -> str | None:
    added = [mask] if mask is not None and number is None else []
    other = next((x.dtype for x in (q, k, v, *added) if x.dtype is not torch.float32), None)
    if other:
        return f"it is computed in {other}, not in float32 throughout"
    if number is not None and not number <= _HIDING:
        return f"{number} is filled in, beside which scores do not vanish"
    if q.dim() not in (3, 4) or not q.dim() == k.dim() == v.dim():
        return f"queries, keys and values have {q.dim()}, {k.dim()} and {v.dim()} dimensions, not all 3 or 4"
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        before = ", ".join(str(list(x.shape[:-2])) for x in (q, k, v))
        return f"queries, keys and values are of {before} matrices"
    if mask is not None and _spreads(mask.shape, (*q.shape[:-1], k.shape[-1])):
        return f"its mask is {list(mask.shape)}, which makes more scores than there are"
    return None


def _spreads(mask: Sequence[Any], scores: Sequence[Any]) -> bool:
    sizes = zip(reversed(mask), reversed(scores), strict=False)
    return len(mask) > len(scores) or any(own not in (1, size) for own, size in sizes)


def _rule(scores: Any, masks: Any, dtype: torch.dtype | None) -> Rule:
    (written, scale), (masked, added) = scores, masks

    def before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, by: float, number: float) -> Tensor:
        return torch.softmax(masked(written(q, k, by), mask, number), -1, dtype=dtype) @ v

    def after(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, by: float, number: float) -> Tensor:
        keys, summand = k.transpose(-2, -1), added(mask, number)
        if summand is not None and summand.dim() < 2:
            summand = summand.expand(1, k.shape[-1])
        if q.dim() == 4:
            return scaled_dot_product_attention(q, keys, v, summand, scale=scale(by))
        q, keys, v = (x.unsqueeze(0) for x in (q, keys, v))
        return scaled_dot_product_attention(q, keys, v, summand, scale=scale(by)).squeeze(0)

    return Rule(before, after, (_Q, _K, _V, _HIDDEN if added is _summand else _ADDED), _unsuitable)


# Transposed keys are transposed back; where they were transposed before, that is twice for nothing.
_TWICE = (
    Rule(lambda x: x.transpose(-2, -1).transpose(-2, -1), lambda x: x, (_Q,)),
    Rule(lambda x: x.mT.transpose(-2, -1), lambda x: x, (_Q,)),
)
_RULES = (*(_rule(*ways) for ways in product(_SCORES, _MASKS, (None, torch.float32))), *_TWICE)

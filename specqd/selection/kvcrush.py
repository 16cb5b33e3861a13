"""KVCrush (arXiv 2503.00022): besides the important tokens, proxies of the rest, spread by how heads see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from functools import cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from specqd.errors import InputError
from specqd.selection.method import Method, best
from specqd.selection.observed import Floats, Ints, Observed
from specqd.selection.snapkv import SnapKV

__all__ = ["Anchor", "KVCrush", "hamming", "head_codes"]

Anchor = Literal["random", "mean", "inverse-mean", "alternating", "zeros", "ones"]
Bits = npt.NDArray[np.bool_]


class KVCrush(Method):
    """The scorer's best tokens, and a share of proxies for those that it would drop.

    1. Each KV head marks the better half of the candidates by its scores: a token's code is one bit a head.
    2. A token's distance is the Hamming distance of its code to the anchor's.
    3. Each head takes its proxies from the candidates that it has not kept itself, evenly spaced in their order by
       distance, then by position: tokens that the heads see alike are neighbours there, and one stands for several.

    With `page` over 1 all this is of whole pages, counted from the first candidate: a page's score is the sum of its
    tokens' scores, its code their codes one after the other. What is left of the budget goes to single tokens.

    A majority bit of single tokens is 0, as each head marks no more than half of them: there `mean` is `zeros`.

    Attributes:
        scorer: the method whose scores count; its budgets of layers and what it carries count too.
        share: how much of what is chosen are proxies, from 0 to 1.
        anchor: which code distances are taken to: `random`, the `mean` (each bit's majority) or its inverse,
            `alternating` (0, 1, 0, ...), `zeros` or `ones`.
        seed: of the random anchor, which differs from layer to layer.
        page: tokens that are kept or dropped together.
    """

    name = "kvcrush"
    scorer: Method = field(default_factory=SnapKV)
    share: float = 0.25
    anchor: Anchor = "random"
    seed: int = 0
    page: int = 1

    def __post_init__(self) -> None:
        """Check the options, and need what the scorer needs."""
        if not 0 <= self.share <= 1:
            raise InputError(f"kvcrush's share is {self.share}; give the part of the budget, from 0 to 1")
        if self.anchor not in get_args(Anchor):
            raise InputError(f"kvcrush has no anchor {self.anchor!r}; have {', '.join(get_args(Anchor))}")
        if self.page < 1:
            raise InputError(f"kvcrush's page is {self.page} tokens; give 1 or more")
        object.__setattr__(self, "needs", self.scorer.needs)

    def score(self, observed: Observed) -> Floats:
        """Return the scorer's scores."""
        return self.scorer.score(observed)

    def carry(self, observed: Observed) -> Floats | None:
        """Return what the scorer carries."""
        return self.scorer.carry(observed)

    def shares(self, layers: int, mean: float, most: float) -> Sequence[float]:
        """Return the scorer's budgets."""
        return self.scorer.shares(layers, mean, most)

    def choose(self, observed: Observed, candidates: slice, count: int) -> Ints:
        """Return the important tokens and the proxies of each head."""
        scores = self.scorer.score(observed)[:, candidates]
        page = self.page
        whole = scores[:, : scores.shape[1] // page * page].reshape(len(scores), -1, page)
        proxies = int(self.share * count) // page
        pages = best(whole.sum(axis=-1) if page > 1 else scores, count // page - proxies)
        if proxies:
            codes = head_codes(scores, page)
            distances = hamming(codes, self._anchor(codes, observed.layer))
            pages = np.append(pages, _proxies(distances, pages, proxies), axis=1)
        tokens = (pages[:, :, None] * page + np.arange(page)).reshape(len(scores), -1)
        left = count - tokens.shape[1]
        if left:
            rest = [np.delete(np.arange(scores.shape[1]), own) for own in tokens]
            single = [one[best(own[None, one], left)[0]] for own, one in zip(scores, rest, strict=True)]
            tokens = np.append(tokens, single, axis=1)
        return (tokens + candidates.start).astype(np.int32)

    def _anchor(self, codes: Bits, layer: int) -> Bits:
        width = codes.shape[1]
        match self.anchor:
            case "random":
                return _drawn(self.seed, layer, width)
            case "mean":
                return codes.sum(axis=0) * 2 > len(codes)
            case "inverse-mean":
                return codes.sum(axis=0) * 2 <= len(codes)
            case "alternating":
                return np.arange(width) % 2 == 1
            case _:
                return np.full(width, self.anchor == "ones")


def head_codes(scores: Floats, page: int = 1) -> Bits:
    """Return bool [T // page, kv_heads * page]: which heads count which tokens of a page to their better half.

    `scores`: float32 [kv_heads, T]. A page's bits are ordered by head, then by token.
    """
    heads, length = scores.shape
    marks = np.zeros((heads, length), bool)
    np.put_along_axis(marks, best(scores, length // 2), True, axis=1)
    whole = marks[:, : length // page * page].reshape(heads, -1, page)
    return whole.transpose(1, 0, 2).reshape(-1, heads * page)


def hamming(codes: Bits, anchor: Bits) -> Ints:
    """Return int32 [N]: in how many of their bits the codes [N, bits] differ from the anchor [bits]."""
    differing = np.packbits(codes, axis=1) ^ np.packbits(anchor)
    counts = np.zeros(len(codes), np.int32)
    for byte in differing.T:  # there are few, and a sum over a short last axis takes several times as long
        counts += np.bitwise_count(byte)
    return counts


@cache
def _drawn(seed: int, layer: int, width: int) -> Bits:
    return np.random.default_rng([seed, layer]).integers(0, 2, width).astype(bool)


def _proxies(distances: Ints, kept: Ints, count: int) -> Ints:
    """Return int32 [heads, count]: of the pages that a head has not `kept`, some evenly spaced by distance."""
    # A page that it took twice would count twice in its softmax.
    free = np.ones((len(kept), len(distances)), bool)
    np.put_along_axis(free, kept, False, axis=1)
    ordered = np.argsort(distances, kind="stable")
    rest = np.broadcast_to(ordered, free.shape)[free[:, ordered]].reshape(len(kept), -1)
    return rest[:, _evenly(rest.shape[1], count)].astype(np.int32)


def _evenly(length: int, count: int) -> npt.NDArray[np.int64]:
    """Return `count` different places of `length`, evenly spaced from the first."""
    return np.arange(count) * length // max(count, 1)

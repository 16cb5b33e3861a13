"""What is compared: methods, sizes and formats of a cache, always at equal total tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from kv_model import Layer, Read
from kv_rounding import FORMATS

from specqd.selection import RECENT, KVCrush, Method, Observed, compact, keep, layer_budgets, method
from specqd.selection.method import best
from specqd.selection.observed import Floats, Ints

__all__ = ["ASKED", "QUICK", "VARIANTS", "WINDOW", "Variant", "compress", "named"]

WINDOW = 64  # queries that are seen

SCORERS = ("random", "streaming-llm", "key-norm", "key-diff", "h2o", "snapkv", "pyramidkv", "tova", "r-kv",
           "expected-attention")  # fmt: skip


class RandomProxies(KVCrush):
    """The control of KVCrush: as many proxies, drawn by lot."""

    name = "random-proxies"

    def choose(self, observed: Observed, candidates: slice, count: int) -> Ints:
        """Return the scorer's best, then any others."""
        scores = self.scorer.score(observed)[:, candidates].copy()
        important = best(scores, count - int(self.share * count))
        lots = np.random.default_rng([self.seed, observed.layer]).random(scores.shape, np.float32)
        np.put_along_axis(lots, important, np.float32(2), axis=1)
        return best(lots, count) + np.int32(candidates.start)


class Remembered(Method):
    """A scorer that scores each layer of one text once, however many variants ask."""

    name = "remembered"
    scorer: Method
    known: dict[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", self.scorer.needs)

    def score(self, observed: Observed) -> Floats:
        """Return the scorer's scores."""
        if observed.layer not in self.known:
            self.known[observed.layer] = self.scorer.score(observed)
        return self.known[observed.layer]

    def shares(self, layers: int, mean: float, most: float) -> Sequence[float]:
        """Return the scorer's budgets."""
        return self.scorer.shares(layers, mean, most)


@dataclass(frozen=True)
class Variant:
    """One row of the results.

    Attributes:
        method: the scorer, or how KVCrush is put around it.
        scorer: the selection method whose scores count; `full` keeps all.
        ratio: how many times fewer tokens.
        format: of `FORMATS`.
        newest: part of the budget that goes to the newest tokens unasked; they get 32 at least.
    """

    method: str
    scorer: str
    ratio: float = 1
    format: str = "bf16"
    newest: float = 0

    def __str__(self) -> str:
        wrapped = self.scorer if self.method == self.scorer else f"{self.method} on {self.scorer}"
        share = f", {self.newest:.0%} newest".replace("%", " %") if self.newest else ""
        return wrapped + share + (f", {self.format}" if self.format != "bf16" else "")

    def bytes_ratio(self, dim: int) -> float:
        """Return how many times fewer bytes than a BF16 cache of the whole text."""
        return self.ratio * 16 / FORMATS[self.format].bits(dim)

    def recent(self, budget: int) -> int:
        """Return how many newest tokens always stay."""
        return max(RECENT, int(self.newest * budget))


# method: (share, anchor, page). An anchor of zeros is the mean's, in token form, and ones its inverse.
_WRAPPED = {
    "kvcrush random": (0.25, "random", 1),
    "kvcrush zeros": (0.25, "zeros", 1),
    "kvcrush ones": (0.25, "ones", 1),
    "kvcrush random 5 %": (0.05, "random", 1),
    "kvcrush random 50 %": (0.5, "random", 1),
    "kvcrush random page 16": (0.25, "random", 16),
    "kvcrush mean page 16": (0.25, "mean", 16),
    "random-proxies": (0.25, "random", 1),
}
_SIZES = (2, 4, 8)
_PLAIN = [Variant(name, name, ratio) for ratio in _SIZES for name in SCORERS]
_CRUSHED = [
    Variant(name, scorer, ratio)
    for ratio in _SIZES
    for scorer in ("snapkv", "h2o", "r-kv")
    for name in ("kvcrush random", "kvcrush random 5 %", "random-proxies")
]
_FORMS = [Variant(name, "snapkv", 4) for name in _WRAPPED] + [
    Variant(name, scorer, 4)
    for scorer in ("key-diff", "expected-attention")
    for name in ("kvcrush random", "random-proxies")
]
_NEWEST = [
    Variant(name, scorer, ratio, newest=0.75)
    for ratio in _SIZES
    for name, scorer in (
        ("random", "random"),
        ("key-diff", "key-diff"),
        ("h2o", "h2o"),
        ("kvcrush random", "h2o"),
    )
]
_TURBO = "turbo4 keys, turbo3 values"
_ROUNDED = [
    *(Variant("full", "full", 1, form) for form in FORMATS if form != "bf16"),
    *(
        Variant(name, "h2o", ratio, form, 0.75)
        for name in ("h2o", "kvcrush random")
        for ratio, form in ((2, "int8"), (4, "int8"), (1.25, _TURBO), (2, _TURBO))
    ),
    *(
        Variant(name, "r-kv", ratio, form)
        for name in ("r-kv", "kvcrush random")
        for ratio, form in ((2, "int8"), (1.25, _TURBO), (2, _TURBO))
    ),
]

VARIANTS = list(dict.fromkeys([*_PLAIN, *_CRUSHED, *_FORMS, *_NEWEST, *_ROUNDED]))
ASKED = list(dict.fromkeys([*_PLAIN, *(v for v in _CRUSHED if v.method == "kvcrush random"), *_ROUNDED]))
"""Those that questions are asked of, which tell apart less than perplexity does."""
QUICK = [v for v in _PLAIN + _CRUSHED if v.ratio == 4]


def named(variant: Variant, scorers: dict[str, Method], seed: int) -> Method:
    """Make the variant's method; `scorers` remember what they scored for this text."""
    if variant.scorer not in scorers:
        options = {"seed": seed} if variant.scorer == "random" else {}
        scorers[variant.scorer] = Remembered(method(variant.scorer, **options))
    scorer = scorers[variant.scorer]
    if variant.method == variant.scorer:
        return scorer
    share, anchor, page = _WRAPPED[variant.method]
    kind = RandomProxies if variant.method == RandomProxies.name else KVCrush
    return kind(scorer=scorer, share=share, anchor=anchor, page=page, seed=seed)


def compress(
    variant: Variant, scorers: dict[str, Method], seen: Sequence[Observed], read: Read, seed: int
) -> list[Layer]:
    """Return the compressed cache; PyramidKV's layers differ in length, and have as many tokens together."""
    length, rounded = seen[0].length, FORMATS[variant.format].round
    if variant.ratio == 1:
        return [rounded(Layer(layer.keys[:, :length], layer.values[:, :length])) for layer in read.layers]
    chosen = named(variant, scorers, seed)
    tokens = int(length / variant.ratio)
    always = {"length": length, "recent": variant.recent(tokens)}
    budgets = layer_budgets(chosen, len(seen), tokens * len(seen), **always)
    past = []
    for layer, observed, budget in zip(read.layers, seen, budgets, strict=True):
        slots = keep(chosen, observed, budget, recent=always["recent"])
        kept = (torch.from_numpy(compact(t.numpy(), slots)) for t in (layer.keys, layer.values))
        past.append(rounded(Layer(*kept)))
    return past

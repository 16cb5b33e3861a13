"""Plans worth a thought: chains of an artifact's drafts with searches between them, and their draft lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product

from specqd.runtime.plan import Link, Plan

__all__ = ["chains", "seeing_all", "variants"]

_DEEPEST = 2  # drafts below each other, searches aside
_SEARCH = Link("suffix", 3, "adaptive")
_DRAFT_RULES = ("fixed:1", "fixed:2", "fixed:3", "fixed:5", "fixed:8", "fixed:12", "confidence:0.5",
                "confidence:0.8", "adaptive")  # fmt: skip
_SEARCH_RULES = ("fixed:3", "fixed:7", "fixed:15", "adaptive")
_SEARCH_LEAST = (2, 3, 4, 6)


def chains(target: str, drafts: Sequence[str]) -> Iterator[Plan]:
    """Yield one plan of each shape, all lengths adaptive, simple shapes first.

    A shape is an order of some drafts, each below the one before; a search may be asked before each, and below the
    last. Whether an order can run at all (who may write to whose cache) is not asked here.
    """
    yield Plan(target, ((_SEARCH,),))
    for count in range(1, _DEEPEST + 1):
        for order in permutations(drafts, count):
            for searched in product((False, True), repeat=count):
                levels = tuple(
                    (_SEARCH, Link(name)) if first else (Link(name),)
                    for name, first in zip(order, searched, strict=True)
                )
                yield Plan(target, levels)
                yield Plan(target, (*levels, (_SEARCH,)))


def variants(plan: Plan, depth: int, place: int) -> Iterator[Plan]:
    """Yield the plan with each other draft length, and of a search each other least match, of one of its links."""
    link = plan.levels[depth][place]
    if link.searches:
        links = [replace(link, least=n, rule=rule) for n in _SEARCH_LEAST for rule in _SEARCH_RULES]
    else:
        links = [replace(link, rule=rule) for rule in _DRAFT_RULES]
    for other in links:
        if other != link:
            level = (*plan.levels[depth][:place], other, *plan.levels[depth][place + 1 :])
            yield Plan(plan.target, (*plan.levels[:depth], level, *plan.levels[depth + 1 :]))


def seeing_all(plan: Plan, entry: str) -> Plan:
    """Return the plan with the level of that name, if there is one, attending to the whole cache."""
    levels = (
        tuple(replace(link, whole=True) if link.name == entry else link for link in level)
        for level in plan.levels
    )
    return Plan(plan.target, tuple(levels))

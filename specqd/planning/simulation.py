"""Plays a plan over a recording, with a clock that adds up measured passes.

Nothing is fitted: what a level would say was recorded, what a pass takes was measured, and a search takes the time
that it takes here.
"""

from __future__ import annotations

from collections.abc import Mapping

from specqd.planning.costs import PassCosts
from specqd.planning.played_levels import Compiled, Played, Scene, Searched, Source
from specqd.planning.recording import Recording, Run
from specqd.runtime.drafting import DraftLength, length_rule
from specqd.runtime.plan import Link, Plan

__all__ = ["Rules", "play"]

Rules = dict[tuple[int, Link], DraftLength]
"""Draft-length rules by depth and level: they keep what they learn from one answer to the next."""


def play(
    plan: Plan,
    recording: Recording,
    costs: PassCosts,
    caches: Mapping[str, frozenset[str]],
    stop: frozenset[int],
    rules: Rules,
) -> Played:
    """Give the answer of a recording by a plan.

    `caches` are the names of those that each entry uses; drafts end at a `stop` token, as the answer does.
    """
    scene = Scene(recording, costs, stop)
    target = _build(plan, scene, caches, rules)
    text = list(recording.text[: recording.prompt + 1])
    target.fed = recording.prompt
    while len(text) < len(recording.text):
        rest = recording.text[len(text) :]
        target.round(text, Run(rest, ((1.0, 0.0),) * len(rest)), len(rest), on_text=True)
    scene.played.seconds = scene.clock
    return scene.played


def _build(plan: Plan, scene: Scene, caches: Mapping[str, frozenset[str]], rules: Rules) -> Compiled:
    compiled = ([link.name for link in level if not link.searches] for level in plan.levels)
    askers = [plan.target, *("".join(names[-1:]) for names in compiled)]
    below: list[Source] = []
    for depth, level in reversed(list(enumerate(plan.levels))):
        made: list[Source] = []
        for link in level:
            made_level: Searched | Compiled
            if link.searches:
                made_level = Searched(link, scene)
            else:
                shares = caches[link.name] <= caches[askers[depth]]
                made_level = Compiled(
                    link.name, scene, below if link.name == askers[depth + 1] else [], shares
                )
            made.append(Source(made_level, rules.setdefault((depth, link), length_rule(link.rule))))
        below = made
    return Compiled(plan.target, scene, below, shares=False)

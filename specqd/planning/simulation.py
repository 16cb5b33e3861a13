"""Plays a plan over a recording: the runtime's own levels, on a clock that adds up measured passes.

Nothing is fitted: what a level would say was recorded, and what a pass takes was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specqd.planning.costs import PassCosts
from specqd.planning.recording import Recording
from specqd.planning.stage import Stage
from specqd.runtime.asking import Round
from specqd.runtime.choosing import Greedy
from specqd.runtime.plan import Plan, Rules

__all__ = ["Played", "play"]


@dataclass(frozen=True)
class Played:
    """An answer as it would go: seconds after the prefill, and the rounds in their order."""

    seconds: float
    rounds: tuple[Round, ...]


def play(
    plan: Plan,
    recording: Recording,
    costs: PassCosts,
    caches: Mapping[str, frozenset[str]],
    stop: frozenset[int],
    rules: Rules,
) -> Played:
    """Give the answer of a recording by a plan.

    `caches` are the names of those that each entry uses. Drafts end at a `stop` token, as the answer does; `rules`
    keeps what the draft-length rules learn.
    """
    stage, rounds = Stage(recording, costs, caches), list[Round]()
    target = plan.build(stage, Greedy(), stop, rounds.append, rules, stage)
    stage.enter(target)
    text = list(recording.text[: recording.prompt + 1])
    target.fed = recording.prompt
    stage.fill(target.entry, text[:-1])
    while len(text) < len(recording.text):
        stage.drive(target.round(text, len(recording.text) - len(text)))
    return Played(stage.seconds, tuple(rounds))

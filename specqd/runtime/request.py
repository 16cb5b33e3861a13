"""A request: a prompt and all that its answer depends on, ready to be decoded alone or beside others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from specqd.errors import SpecqdError
from specqd.runtime.answer import Answer
from specqd.runtime.asking import Place, Round
from specqd.runtime.choosing import Chooser
from specqd.runtime.engine import Engine
from specqd.runtime.generate import Decoding
from specqd.runtime.plan import Plan, Rules

__all__ = ["Request"]


@dataclass(eq=False)
class Request:
    """What `Model.request` makes. `error` is what ended it, if anything did; `answer` is where its tokens go."""

    prompt: list[int]
    max_new_tokens: int
    plan: Plan
    chooser: Chooser
    answer: Answer
    stop_tokens: frozenset[int] = frozenset()
    on_round: Callable[[Round], None] | None = None
    error: SpecqdError | None = None

    @property
    def positions(self) -> int:
        """Positions of the cache that it may take."""
        return len(self.prompt) + self.max_new_tokens

    def begin(self, engine: Engine, rules: Rules, place: Place | None = None) -> Decoding:
        """Make its chain of levels; `rules` and `place` are as for `Plan.build`.

        Raises:
            InputError: the prompt does not fit, or the plan cannot be followed.
        """
        target = self.plan.build(engine, self.chooser, self.stop_tokens, self.on_round, rules, place)
        target.chooser = self.answer.scored or self.chooser
        busy = place.spent if place else None
        return Decoding(engine, target, self.prompt, self.answer.stats, self.max_new_tokens, busy)

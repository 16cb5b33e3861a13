"""How fast a plan would be, and which plan of each shape would be fastest, by playing recordings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import geometric_mean

from specqd.planning.candidates import variants
from specqd.planning.costs import PassCosts
from specqd.planning.recording import Recording
from specqd.planning.simulation import Played, play
from specqd.runtime.plan import Plan, Rules

__all__ = ["Predictor"]

_WORTH = 1.002  # a change of the plan gains at least this factor


@dataclass
class Predictor:
    """Predicts from recordings of several answers.

    `caches` are the names of those that each entry uses; answers end at a `stop` token.
    """

    target: str
    recordings: Sequence[Recording]
    costs: PassCosts
    caches: Mapping[str, frozenset[str]]
    stop: frozenset[int]
    _known: dict[Plan, float] = field(default_factory=dict, init=False)

    def play(self, plan: Plan) -> list[Played]:
        """Give all answers by a plan, one after the other: its draft-length rules learn as they go."""
        rules: Rules = {}
        return [play(plan, one, self.costs, self.caches, self.stop, rules) for one in self.recordings]

    def speedup(self, plan: Plan) -> float:
        """Return how many times faster than plainly the plan decodes: the geometric mean over the answers."""
        if plan not in self._known:
            pairs = zip(self._plain, self.play(plan), strict=True)
            self._known[plan] = geometric_mean(plain.seconds / planned.seconds for plain, planned in pairs)
        return self._known[plan]

    @cached_property
    def _plain(self) -> list[Played]:
        return self.play(Plan(self.target))

    @property
    def considered(self) -> int:
        """How many plans were played."""
        return len(self._known)

    def best(self, shapes: Collection[Plan], count: int, tell: Callable[[int, int], None]) -> list[Plan]:
        """Return the best plan of each of the `count` best shapes, best first.

        Shapes are ranked as they are; then each link of a plan in turn takes the rule that is best beside the others'.
        """
        ranked = sorted(shapes, key=self.speedup, reverse=True)[: 2 * count]
        improved = []
        for done, plan in enumerate(ranked):
            tell(done, len(ranked))
            improved.append(self._improve(plan))
        return sorted(improved, key=self.speedup, reverse=True)[:count]

    def _improve(self, plan: Plan) -> Plan:
        while True:
            better = plan
            for depth, level in enumerate(plan.levels):
                for place in range(len(level)):
                    better = max([better, *variants(better, depth, place)], key=self.speedup)
            if self.speedup(better) < _WORTH * self.speedup(plan):
                return plan
            plan = better

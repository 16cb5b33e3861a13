"""Runs plans in turns and sets what was measured against what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

from specqd.errors import ArtifactError
from specqd.planning.prediction import Predictor
from specqd.planning.recording import Recording
from specqd.runtime.model import Model
from specqd.runtime.plan import Plan

__all__ = ["Trial", "compare", "run_plans"]


@dataclass(frozen=True)
class Trial:
    """A plan that was run: tokens/s, and how many times faster than plainly it is, as predicted and as measured.

    Gains are geometric means over the prompts.
    """

    plan: str
    predicted: float
    measured: float
    tokens_per_s: float

    @property
    def error(self) -> float:
        """How far the prediction was above what was measured, as a share of that."""
        return self.predicted / self.measured - 1


def run_plans(
    model: Model,
    recordings: Sequence[Recording],
    plans: Sequence[Plan],
    between: Callable[[], None],
    tell: Callable[[int, int], None],
) -> dict[Plan, list[float]]:
    """Give all answers by each plan, in turns that begin with another one each time; return tokens/s of each answer.

    `between` is called after the turns of each answer.

    Raises:
        ArtifactError: a plan changes an answer.
    """
    # Each plan has a Model of its own, since a Model's draft-length rules learn.
    ways = {plan: Model(model.engine) for plan in plans}
    rates: dict[Plan, list[float]] = {plan: [] for plan in ways}
    order = list(ways)
    for done, recording in enumerate(recordings):
        tell(done, len(recordings))
        prompt, answer = recording.text[: recording.prompt], list(recording.text[recording.prompt :])
        for plan in order:
            made = ways[plan].generate(prompt, len(answer), plan=str(plan))
            if made.tokens != answer:
                raise ArtifactError(
                    f"the plan {plan} changes the answer of {model.engine.artifact.directory}: compile it again, and "
                    "please report it"
                )
            rates[plan].append(made.stats.decode_tokens_per_s)
        order = [*order[1:], order[0]]
        between()
    return rates


def compare(predictor: Predictor, rates: Mapping[Plan, Sequence[float]]) -> list[Trial]:
    """Set what `run_plans` gave for each plan but the target alone against what is predicted."""
    plain = rates[Plan(predictor.target)]
    return [
        Trial(
            plan=str(plan),
            predicted=predictor.speedup(plan),
            measured=geometric_mean(a / b for a, b in zip(own, plain, strict=True)),
            tokens_per_s=median(own),
        )
        for plan, own in rates.items()
        if plan.levels
    ]

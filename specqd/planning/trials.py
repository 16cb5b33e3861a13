"""Runs plans in turns and sets what was measured against what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

from specqd.errors import ArtifactError
from specqd.planning.prediction import Predictor
from specqd.runtime.model import Model
from specqd.runtime.plan import Plan

__all__ = ["Trial", "run_trials"]


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


def run_trials(
    model: Model, predictor: Predictor, plans: Sequence[Plan], tell: Callable[[int, int], None]
) -> tuple[list[Trial], float]:
    """Answer all prompts by each plan and plainly, in turns that begin with another one each time."""
    # Each plan has a Model of its own, since a Model's draft-length rules learn.
    ways = {plan: Model(model.engine) for plan in (Plan(predictor.target), *plans)}
    seconds: dict[Plan, list[float]] = {plan: [] for plan in ways}
    for done, recording in enumerate(predictor.recordings):
        tell(done, len(predictor.recordings))
        prompt, answer = recording.text[: recording.prompt], list(recording.text[recording.prompt :])
        order = list(ways)
        for plan in order[done % len(order) :] + order[: done % len(order)]:
            made = ways[plan].generate(prompt, len(answer), plan=str(plan))
            if made.tokens != answer:
                raise ArtifactError(
                    f"the plan {plan} changes the answer of {model.engine.artifact.directory}: compile it again, and "
                    "please report it"
                )
            seconds[plan].append(made.stats.decode_seconds)
    counts = [len(one.text) - one.prompt - 1 for one in predictor.recordings]
    rates = {
        plan: [count / taken for count, taken in zip(counts, times, strict=True)]
        for plan, times in seconds.items()
    }
    plain = rates.pop(Plan(predictor.target))
    trials = [
        Trial(
            plan=str(plan),
            predicted=predictor.speedup(plan),
            measured=geometric_mean(a / b for a, b in zip(own, plain, strict=True)),
            tokens_per_s=median(own),
        )
        for plan, own in rates.items()
    ]
    return trials, median(plain)

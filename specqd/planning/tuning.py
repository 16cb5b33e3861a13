"""`specqd tune`: the plan that decodes fastest on this machine, as predicted, tried and stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from specqd.artifact import demand_writable, store_plan
from specqd.errors import InputError
from specqd.planning.candidates import chains, seeing_all
from specqd.planning.costs import Stopwatch
from specqd.planning.levels import LevelCost, level_costs
from specqd.planning.prediction import Predictor
from specqd.planning.recording import record
from specqd.planning.trials import Trial, compare, run_plans
from specqd.runtime.model import Model, load
from specqd.runtime.plan import Plan

__all__ = ["Tuned", "observe", "run_beside", "tune"]

Progress = Callable[[str, int, int], None]

_TRIED = 6  # plans that are run, besides the artifact's own
_BOTH_WAYS = (
    2  # of those, plans that are also run with drafts that see all, if positions are selected for one
)
_REPEATS = 12  # of the timing of each kind of pass, before the search and again between the trials
_ROOM = 16  # positions beyond an answer: a verify pass may reach there
_PAYS = 1.02  # times plain decoding; less is noise
_FEWEST = 8  # tokens of an answer that says something


@dataclass(frozen=True)
class Tuned:
    """What `tune` found; `plan` is the best trial's, or the target alone if none pays."""

    plan: str
    predicted: float
    trials: tuple[Trial, ...]
    levels: tuple[LevelCost, ...]
    plain_tokens_per_s: float
    prompts: int
    tokens: int
    considered: int


def tune(
    directory: str | Path,
    prompts: Sequence[Sequence[int] | str],
    *,
    new_tokens: int = 128,
    threads: int | None = None,
    raw: bool = False,
    store: bool = True,
    progress: Progress | None = None,
) -> Tuned:
    """Find how the artifact answers prompts like these fastest, greedily, and store that plan in it.

    Each level is recorded along the target's answers, each kind of pass is timed, many plans are played, and the
    best are run in turns with the artifact's own. Passes are timed again between those runs, and what is predicted
    follows from that. The artifact changes at the very end, in one step, if `store`.

    Raises:
        InputError: an option is out of range, the cache is too small, nothing can draft, or the artifact cannot
            be written to.
        ArtifactError: the artifact cannot be loaded, or a plan changes an answer.
    """
    if new_tokens < _FEWEST:
        raise InputError(f"{new_tokens} new tokens say nothing about speed: ask for {_FEWEST} or more")
    if store:
        demand_writable(Path(directory))
    tell = progress or (lambda what, done, of: None)
    model = load(directory, threads, prefix_sharing=False)
    _demand_choice(model)
    texts = _fitting(model, [model.encode(prompt, raw=raw) for prompt in prompts], new_tokens)
    predictor, watch = observe(model, texts, new_tokens, tell)
    chain = model.engine.manifest.chain
    shapes = [plan for plan in chains(predictor.target, chain[1:]) if _runs(model, plan)]
    best = predictor.best(shapes, _TRIED, lambda done, of: tell("playing plans", done, of))
    considered = predictor.considered
    tried = dict.fromkeys([Plan(predictor.target), *best, model.plan])
    selection = model.engine.manifest.selection
    if selection and any(len(text) + new_tokens > selection.above for text in texts):
        tried |= dict.fromkeys(seeing_all(plan, selection.entry) for plan in best[:_BOTH_WAYS])
    rates, predictor = run_beside(model, predictor, watch, list(tried), tell)
    trials = compare(predictor, rates)
    winner = max(trials, key=lambda trial: trial.measured)
    pays = winner.measured >= _PAYS
    tuned = Tuned(
        plan=winner.plan if pays else predictor.target,
        predicted=winner.predicted if pays else 1.0,
        trials=tuple(sorted(trials, key=lambda trial: -trial.measured)),
        levels=tuple(level_costs(predictor, chain)),
        plain_tokens_per_s=median(rates[Plan(predictor.target)]),
        prompts=len(predictor.recordings),
        tokens=sum(len(one.text) - one.prompt for one in predictor.recordings),
        considered=considered,
    )
    if store:
        store_plan(Path(directory), tuned.plan, tuned.predicted)
    return tuned


def observe(
    model: Model, texts: Sequence[list[int]], new_tokens: int, tell: Progress
) -> tuple[Predictor, Stopwatch]:
    """Record the levels along the target's answers to prompts that fit the caches, and time all passes in between.

    Raises:
        InputError: no answer is long enough to say something.
    """
    engine = model.engine
    chain = engine.manifest.chain
    lengths = [len(text) for text in texts]
    positions = min(lengths), max(lengths) + new_tokens
    watch = Stopwatch(engine, chain, positions, _overhead(model, texts[0], new_tokens))
    recordings = []
    for done, text in enumerate(texts):
        tell("recording what each level says", done, len(texts))
        answer = model.generate(text, new_tokens, speculate=False).tokens
        if len(answer) >= _FEWEST:
            recordings.append(record(engine, text, answer, chain[1:]))
        watch.sample(_samples(texts))
    if not recordings:
        raise InputError(
            f"the model ends every answer before {_FEWEST} tokens, too few to measure: give other prompts"
        )
    caches = {name: engine.caches(name) for name in chain}
    stop = frozenset(engine.manifest.eos_token_ids)
    return Predictor(chain[0], recordings, watch.costs(), caches, stop), watch


def run_beside(
    model: Model, predictor: Predictor, watch: Stopwatch, plans: Sequence[Plan], tell: Progress
) -> tuple[dict[Plan, list[float]], Predictor]:
    """Run plans as `run_plans` does, and time all passes anew in between: a prediction for the same minutes."""
    watch.restart()
    rates = run_plans(
        model,
        predictor.recordings,
        plans,
        lambda: watch.sample(_samples(predictor.recordings)),
        lambda done, of: tell("trying the best", done, of),
    )
    return rates, replace(predictor, costs=watch.costs())


def _samples(prompts: Sized) -> int:
    """How often to time passes after each of some prompts."""
    return math.ceil(_REPEATS / len(prompts))


def _demand_choice(model: Model) -> None:
    target = model.engine.manifest.chain[0]
    if max(model.engine.rows(target, every_row=True)) < 2:
        raise InputError(
            f"{model.engine.artifact.directory} has no pass that checks a draft, so plain decoding is all there is: "
            "compile the model again to tune it"
        )


def _fitting(model: Model, texts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Cut prompts to their ends where the caches hold no more."""
    if not texts:
        raise InputError("there are no prompts: give at least one")
    manifest = model.engine.manifest
    holds = min(manifest.level(entry).capacity for entry in manifest.chain)
    room = holds - new_tokens - _ROOM
    if room < 1:
        raise InputError(
            f"tuning with {new_tokens} new tokens takes more than the {holds} positions that the cache holds: ask for "
            f"fewer `--tokens`, or compile with `--context {new_tokens + 2 * _ROOM}` or more"
        )
    return [text[-room:] for text in texts]


def _overhead(model: Model, text: Sequence[int], new_tokens: int) -> float:
    """Seconds that a pass takes outside compiled code, on the average of one run with each draft and one without."""
    target, *drafts = model.engine.manifest.chain
    seconds, passes = 0.0, 0
    for plan in (target, *(f"{target} <- {draft}@fixed:4" for draft in drafts)):
        stats = model.generate(text, new_tokens, plan=plan, ignore_eos=True).stats
        seconds += stats.decode_seconds - stats.compiled_seconds
        passes += stats.rounds + sum(level.passes for level in stats.levels)
    return seconds / passes


def _runs(model: Model, plan: Plan) -> bool:
    """Whether the runtime takes the plan: it refuses those in which levels would overwrite each other's caches."""
    try:
        model.generate([0], 1, plan=str(plan))
    except InputError:
        return False
    return True

"""`specqd tune`: the plan that decodes fastest on this machine, as predicted, tried and stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specqd.artifact import demand_writable, store_plan
from specqd.errors import InputError
from specqd.planning.candidates import chains
from specqd.planning.costs import measure
from specqd.planning.levels import LevelCost, level_costs
from specqd.planning.prediction import Predictor
from specqd.planning.recording import Recording, record
from specqd.planning.trials import Trial, run_trials
from specqd.runtime.model import Model, load
from specqd.runtime.plan import Plan

__all__ = ["Tuned", "observe", "tune"]

Progress = Callable[[str, int, int], None]

_TRIED = 6  # plans that are run, besides the artifact's own
_REPEATS = 12  # of the timing of each kind of pass
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

    Each level is recorded along the target's answers, each kind of pass is timed, all plans that `candidates`
    knows are played, and the best are run in turns. The artifact changes at the very end, in one step, if `store`.

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
    model = load(directory, threads)
    _demand_choice(model)
    texts = _fitting(model, [model.encode(prompt, raw=raw) for prompt in prompts], new_tokens)
    predictor = observe(model, texts, new_tokens, tell)
    shapes = [
        plan for plan in chains(predictor.target, model.engine.manifest.chain[1:]) if _runs(model, plan)
    ]
    best = predictor.best(shapes, _TRIED, lambda done, of: tell("playing plans", done, of))
    tried = dict.fromkeys([*best, model.plan] if model.plan.levels else best)
    trials, plain = run_trials(
        model, predictor, list(tried), lambda done, of: tell("trying the best", done, of)
    )
    winner = max(trials, key=lambda trial: trial.measured)
    pays = winner.measured >= _PAYS
    tuned = Tuned(
        plan=winner.plan if pays else predictor.target,
        predicted=winner.predicted if pays else 1.0,
        trials=tuple(sorted(trials, key=lambda trial: -trial.measured)),
        levels=tuple(level_costs(predictor, model.engine.manifest.chain)),
        plain_tokens_per_s=plain,
        prompts=len(predictor.recordings),
        tokens=sum(len(one.text) - one.prompt for one in predictor.recordings),
        considered=predictor.considered,
    )
    if store:
        store_plan(Path(directory), tuned.plan, tuned.predicted)
    return tuned


def observe(model: Model, texts: Sequence[list[int]], new_tokens: int, tell: Progress) -> Predictor:
    """Record the levels along the target's answers to prompts that fit the caches, and time all passes.

    Raises:
        InputError: no answer is long enough to say something.
    """
    recordings = _record(model, texts, new_tokens, tell)
    engine = model.engine
    positions = min(one.prompt for one in recordings), max(len(one.text) for one in recordings)
    costs = measure(
        engine,
        engine.manifest.chain,
        positions,
        _overhead(model, recordings[0]),
        _REPEATS,
        lambda done, of: tell("timing passes", done, of),
    )
    caches = {name: frozenset(engine.manifest.sizes("cache", name)) for name in engine.manifest.chain}
    stop = frozenset(engine.manifest.eos_token_ids)
    return Predictor(engine.manifest.chain[0], recordings, costs, caches, stop)


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


def _record(model: Model, texts: Sequence[list[int]], new_tokens: int, tell: Progress) -> list[Recording]:
    recordings = []
    for done, text in enumerate(texts):
        tell("recording what each level says", done, len(texts))
        answer = model.generate(text, new_tokens, speculate=False).tokens
        if len(answer) >= _FEWEST:
            recordings.append(record(model.engine, text, answer, model.engine.manifest.chain[1:]))
    if not recordings:
        raise InputError(
            f"the model ends every answer before {_FEWEST} tokens, too few to measure: give other prompts"
        )
    return recordings


def _overhead(model: Model, recording: Recording) -> float:
    """Seconds that a pass takes outside compiled code, on the average of one run with each draft and one without."""
    target, *drafts = model.engine.manifest.chain
    seconds, passes = 0.0, 0
    for plan in (target, *(f"{target} <- {draft}@fixed:4" for draft in drafts)):
        new_tokens = len(recording.text) - recording.prompt
        stats = model.generate(recording.text[: recording.prompt], new_tokens, plan=plan).stats
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

"""Playing recordings: the rounds are those that the runtime really goes through, the time is the sum of the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from toy import compile_toy, model_next, save_toy, table

from specqd.planning.costs import PassCosts, Stopwatch
from specqd.planning.recording import DEPTH, Recording, record
from specqd.planning.simulation import Played, play
from specqd.runtime.asking import Round
from specqd.runtime.model import Model, load
from specqd.runtime.plan import Plan

TABLE = table().tolist()
PROMPT, LENGTH, WRONG = [1, 2, 3], 48, 5
ENTRIES = ("target", "draft", "other")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("simulation")
    save_toy(folder / "a", compile_toy(folder, wrong_every=WRONG), chain=ENTRIES, eos_token_ids=())
    return load(folder / "a")


@pytest.fixture(scope="module")
def recording(model: Model) -> Recording:
    answer = model.generate(PROMPT, LENGTH, speculate=False).tokens
    return record(model.engine, PROMPT, answer, ENTRIES[1:])


def costs(**seconds: float) -> PassCosts:
    """So many seconds a pass of an entry, whatever its rows, and a thousandth for each row."""
    sizes = {"target": (1, 2, 3, 4, 8), "draft": (1, 2), "other": (1, 2)}
    passes = {
        (name, rows, again): (took + rows / 1000,) * 2
        for name, took in seconds.items()
        for rows in sizes[name]
        for again in (False, True)
    }
    return PassCosts((0, 100), sizes, passes, overhead=0.0)


def played(
    model: Model, recording: Recording, plan: str, passes: PassCosts, stop: frozenset[int] = frozenset()
) -> Played:
    caches = {name: model.engine.caches(name) for name in ENTRIES}
    return play(Plan.parse(plan), recording, passes, caches, stop, {})


def counted(rounds: Iterable[Round]) -> list[tuple[str, str, int, int]]:
    """Of each round, who drafted for whom, how many, and how many stood."""
    pairs = [(r, [a == b for a, b in zip(r.drafts, r.new, strict=False)]) for r in rounds]
    return [(r.level, r.below, len(r.drafts), [*same, False].index(False)) for r, same in pairs]


def rounds_of(model: Model, plan: str, limit: int) -> tuple[list[int], list[tuple[str, str, int, int]]]:
    """The tokens of the runtime, and its rounds."""
    told: list[Round] = []
    tokens = model.generate(PROMPT, limit, plan=plan, on_round=told.append).tokens
    return tokens, counted(told)


@pytest.mark.parametrize("draft", ["draft", "other"])
def test_a_run_is_what_the_draft_says_alone(recording: Recording, draft: str):
    text = list(recording.text)
    assert sorted(recording.runs[draft]) == list(range(len(PROMPT) + 1, len(text)))
    lengths = set()
    for start, run in recording.runs[draft].items():
        expected = text[:start]
        for _ in run.tokens:
            expected.append(model_next(expected, TABLE, WRONG))
        assert list(run.tokens) == expected[start:]
        agreed = next(
            (i for i, (a, b) in enumerate(zip(run.tokens, text[start:], strict=False)) if a != b), 99
        )
        lengths.add(len(run.tokens))
        assert len(run.tokens) == min(DEPTH, agreed + 5) or start + len(run.tokens) >= len(text)
    assert lengths & set(range(5, DEPTH))


@pytest.mark.parametrize(
    "plan",
    [
        "target",
        "target <- draft@fixed:1",
        "target <- draft@fixed:7",
        "target <- other@fixed:4",
        "target <- other@heuristic:3",
        "target <- suffix:1@fixed:3",
        "target <- suffix:1@fixed:3 | draft@fixed:2",
        "target <- draft@fixed:6 <- suffix:1@fixed:1",
        "target <- suffix:2@fixed:7 | other@fixed:4 <- suffix:1@fixed:1",
    ],
)
def test_the_rounds_are_those_of_the_runtime(model: Model, recording: Recording, plan: str):
    made, real = rounds_of(model, plan, LENGTH)
    assert made == list(recording.text[len(PROMPT) :])
    found = played(model, recording, plan, costs(target=1.0, draft=0.3, other=0.2)).rounds
    assert counted(found) == real
    assert real or plan == "target"


@pytest.mark.parametrize("plan", ["target <- draft@fixed:7 <- suffix:1@fixed:1", "target <- other@fixed:5"])
def test_answers_and_drafts_end_at_a_stop_token(tmp_path: Path, recording: Recording, plan: str):
    answer = recording.text[len(PROMPT) :]
    last = next(i for i, token in enumerate(answer) if i > 20 and token not in answer[:i])
    stop = answer[last]
    save_toy(tmp_path / "a", compile_toy(tmp_path, wrong_every=WRONG), chain=ENTRIES, eos_token_ids=(stop,))
    model = load(tmp_path / "a")
    made, real = rounds_of(model, plan, last + 1)
    assert made == list(answer[: last + 1])
    cut = Recording(len(PROMPT), recording.text[: len(PROMPT) + last + 1], recording.runs)
    found = played(model, cut, plan, costs(target=1.0, draft=0.3, other=0.2), frozenset({stop})).rounds
    assert counted(found) == real


def test_where_a_draft_is_drafted_for_off_the_recording_the_rounds_come_close(
    model: Model, recording: Recording
):
    plan = "target <- draft@fixed:6 <- other@fixed:1"
    real = Counter[str]()
    model.generate(PROMPT, LENGTH, plan=plan, on_round=lambda r: real.update({r.level: len(r.drafts)}))
    found = Counter[str]()
    for one in played(model, recording, plan, costs(target=1.0, draft=0.3, other=0.2)).rounds:
        found[one.level] += len(one.drafts)
    assert found["target"] == pytest.approx(real["target"], rel=0.1)
    assert found["draft"] == pytest.approx(real["draft"], rel=0.1)


def test_the_time_is_the_sum_of_the_passes(model: Model, recording: Recording):
    found = played(model, recording, "target <- draft@fixed:3", costs(target=1.0, draft=0.25))
    passes = len(found.rounds) + (LENGTH - 1 - sum(agreed + 1 for *_, agreed in counted(found.rounds)))
    drafted = sum(len(r.drafts) for r in found.rounds)
    rows = passes + 2 * drafted  # each drafted token is a row of a pass of its own, and of the target's
    assert found.seconds == pytest.approx(passes + 0.25 * drafted + rows / 1000)


def test_a_draft_with_a_cache_of_its_own_reads_the_prompt_first(model: Model, recording: Recording):
    passes = costs(target=1.0, other=0.25)
    found = played(model, recording, "target <- other@fixed:1", passes)
    drafted = len(found.rounds)
    assert (
        found.seconds
        > drafted * 1.25 + (LENGTH - 1 - sum(agreed + 1 for *_, agreed in counted(found.rounds))) + 0.25
    )


def test_a_pass_after_ones_own_may_be_cheaper_and_later_ones_dearer():
    passes = PassCosts(
        (100, 200),
        {"draft": (1, 4)},
        {
            ("draft", 1, False): (2.0, 3.0),
            ("draft", 1, True): (1.0, 2.0),
            ("draft", 4, True): (5.0, 5.0),
            ("draft", 4, False): (6.0, 6.0),
            ("draft", 32, True): (7.0, 7.0),
        },
        overhead=0.125,
    )
    assert passes.of("draft", 1, 100, again=True) == 1.125
    assert passes.of("draft", 1, 150, again=True) == 1.625
    assert passes.of("draft", 1, 300, again=False) == 4.125
    assert passes.of("draft", 3, 150, again=True) == 5.125  # there is no pass of three rows
    assert passes.rows("draft") == [1, 4, 32]


def test_every_pass_is_timed_at_both_positions_that_fit(model: Model):
    watch = Stopwatch(model.engine, ENTRIES, (3, 60), overhead=0.5)
    watch.sample(5)
    found = watch.costs()
    sizes = {(f.entry, f.rows) for f in model.engine.manifest.functions}
    assert found.seconds.keys() == {(*size, again) for size in sizes for again in (False, True)}
    assert all(0 < low < 1 and 0 < high < 1 for low, high in found.seconds.values())
    assert found.checking["target"] == (1, 2, 3, 4, 8)
    assert found.overhead == 0.5
    watch.restart()
    assert watch.costs().seconds == {}

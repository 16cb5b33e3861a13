"""Chains of levels: whatever drafts for whom, the tokens are the target's; plans are text that round-trips."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import CAPACITY, EOS, VOCAB, compile_toy, model_next, save_toy, table

from specqd.errors import InputError
from specqd.runtime.asking import Round
from specqd.runtime.model import Model, load
from specqd.runtime.plan import Plan

TABLE = table().tolist()
PLANS = [
    "target <- draft@fixed:3 <- suffix:2@fixed:3",
    "target <- other@fixed:4 <- suffix:1@fixed:2",
    "target <- suffix:2@fixed:7 | draft@adaptive",
    "target <- suffix:2@fixed:7 | other@confidence:0.5 <- suffix:1@fixed:3",
    "target <- draft@fixed:6 <- other@fixed:3 <- suffix:1@fixed:2",
    "target <- other@adaptive | draft@adaptive <- suffix:1@adaptive",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("levels")
    save_toy(folder / "a", compile_toy(folder, wrong_every=5))
    return load(folder / "a")


def expected(prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + min(limit, CAPACITY - len(prompt) + 1):
        tokens.append(model_next(tokens, TABLE))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PLANS), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), st.integers(1, 70)
)
def test_every_chain_gives_the_tokens_of_the_target(model: Model, plan: str, prompt: list[int], limit: int):
    made = model.generate(prompt, limit, plan=plan)
    assert made.tokens == expected(prompt, limit)
    assert made.stats.new_tokens == len(made.tokens)
    for level in made.stats.levels:
        assert level.accepted <= level.examined <= level.proposed


def test_rounds_are_told_and_add_up(model: Model):
    rounds: list[Round] = []
    made = model.generate([1, 2, 3], 50, plan=PLANS[4], ignore_eos=True, on_round=rounds.append)
    of_target = [r for r in rounds if r.level == "target"]
    assert {r.below for r in of_target} == {"draft"}
    assert {r.below for r in rounds if r.level == "draft"} == {"other"}
    assert sum(len(r.new) - 1 for r in of_target) == made.stats.accepted
    for r in rounds:
        assert r.new[:-1] == r.drafts[: len(r.new) - 1]
    assert 0 < made.stats.compiled_seconds < made.stats.decode_seconds


@pytest.mark.parametrize("plan", ["target", *PLANS])
def test_a_plan_is_text_that_round_trips(plan: str):
    assert str(Plan.parse(plan)) == plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "does not begin with the name of an entry"),
        ("target <- ", "has a level ''"),
        ("target <- draft:3", "write `entry@rule`, `entry:whole@rule` or `suffix:N@rule`"),
        ("target <- suffix:whole", "write `entry@rule`, `entry:whole@rule` or `suffix:N@rule`"),
        ("target <- draft@sometimes", "no draft-length rule 'sometimes'"),
        ("target <- draft@fixed:0", "no draft-length rule 'fixed:0'"),
        ("target <- suffix <- draft", "drafts for a search"),
        ("target <- other <- other", "names the level other twice"),
        ("target <- draft | target", "names the level target twice"),
        ("target <- third", "a level 'third', which the artifact has not; it has target, draft, other"),
        ("target <- other <- draft", "draft would overwrite a cache that another level relies on"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(model: Model, plan: str, message: str):
    with pytest.raises(InputError, match=message):
        model.generate([1], 4, plan=plan)
    with pytest.raises(InputError, match="not both"):
        model.generate([1], 4, plan="target", draft_length=2)


def test_the_plan_of_the_artifact_is_followed_unless_another_is_given(tmp_path: Path):
    save_toy(tmp_path / "a", compile_toy(tmp_path), plan="target <- suffix:4@adaptive | draft@fixed:5")
    model = load(tmp_path / "a")
    rounds: list[Round] = []
    model.generate([1, 2, 3], 12, ignore_eos=True, on_round=rounds.append)
    assert {r.below for r in rounds} <= {"suffix", "draft"}
    assert len(rounds[0].drafts) == 5
    del rounds[:]
    model.generate([1, 2, 3], 12, ignore_eos=True, on_round=rounds.append, draft_length=2)
    assert {(r.below, len(r.drafts)) for r in rounds[:-1]} == {("draft", 2)}


def test_the_usual_plan():
    assert str(Plan.usual(["target"])) == "target"
    assert str(Plan.usual(["target", "draft"])) == (
        "target <- suffix:4@adaptive | draft@adaptive <- suffix:3@adaptive"
    )
    assert str(Plan.usual(["target", "sibling", "draft"])) == (
        "target <- suffix:4@adaptive | sibling@adaptive | draft@adaptive <- suffix:3@adaptive"
    )


def test_artifacts_of_one_level_decode_plainly(tmp_path: Path):
    save_toy(tmp_path / "a", compile_toy(tmp_path), chain=("target",), plan="target")
    made = load(tmp_path / "a").generate([1, 2, 3], 20)
    assert made.tokens == expected([1, 2, 3], 20)
    assert made.stats.levels == ()

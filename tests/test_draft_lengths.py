"""Draft-length rules: what each does, and that the cost-aware one finds what pays on machines with known costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from specqd.errors import InputError
from specqd.runtime.cost_aware import PassCost
from specqd.runtime.drafting import DraftLength, length_rule

NAN = math.nan
RULES = [
    "fixed:3",
    "confidence:0.4",
    "confidence:0.4/5",
    "entropy",
    "entropy/6",
    "heuristic:4",
    "adaptive",
    "adaptive/7",
]
STEP, PASS, ROW = 0.3, 1.0, 0.05  # seconds of a draft step, of a verify pass of one row, of each further one


def draft(rule: DraftLength, sure: Iterator[float], pace: float = 1.0) -> list[float]:
    """Draft one round as a level does; return the probabilities of the tokens drafted."""
    want, drafted = rule.choose(pace), list[float]()
    while len(drafted) < want:
        p = next(sure)
        drafted.append(p)
        if not rule.goes_on(len(drafted), p, -p * math.log(p) - (1 - p) * math.log(1 - p)):
            break
    return drafted


def settle(
    rule: DraftLength, certainty: Callable[[np.random.Generator], float], step: float, rounds: int = 400
) -> tuple[list[int], float]:
    """Play rounds where the draft knows its own chances; return the lengths and the pace of the last half."""
    chance = np.random.default_rng(1)
    sure = iter(lambda: certainty(chance), None)
    lengths, seconds, tokens, pace = [], 0.0, 0, math.inf
    for number in range(rounds):
        drafted = draft(rule, sure, pace)
        agreed = next((i for i, p in enumerate(drafted) if chance.random() >= p), len(drafted))
        verify = PASS + ROW * len(drafted)
        rule.learn(len(drafted), agreed, step * len(drafted), verify)
        pace = 0.97 * (pace if math.isfinite(pace) else 1.0) + 0.03 * (step * len(drafted) + verify) / (
            agreed + 1
        )
        if number >= rounds // 2:
            lengths.append(len(drafted))
            seconds, tokens = seconds + step * len(drafted) + verify, tokens + agreed + 1
    return lengths, seconds / tokens


def always(p: float) -> Callable[[np.random.Generator], float]:
    return lambda chance: p


def mixed(chance: np.random.Generator) -> float:
    """Three tokens of four are nearly certain, one is a guess."""
    return 0.97 if chance.random() < 0.75 else 0.3


@pytest.mark.parametrize("text", RULES)
def test_every_rule_drafts_within_its_bounds_and_forgets_nothing_of_the_interface(text: str):
    rule = length_rule(text)
    lengths, pace = settle(rule, mixed, STEP)
    most = int(text.partition("/")[2] or (3 if text == "fixed:3" else 15))
    assert 0 < max(lengths) <= most
    assert pace < 1.0  # every rule gains here
    rule.goes_on(1, NAN, NAN)
    rule.learn(0, 0, 0.0, PASS)


def test_confidence_stops_at_doubt_and_not_at_what_is_unknown():
    rule = length_rule("confidence:0.4")
    assert [rule.goes_on(1, p, 0.0) for p in (0.39, 0.4, 0.9, NAN)] == [False, True, True, True]


def test_entropy_stops_at_the_bound_and_moves_its_threshold():
    rule = length_rule("entropy")
    bound = 5 * (1 - 0.4) ** 2  # where 1 - sqrt(0.2 H) is 0.4
    assert [rule.goes_on(1, 0.5, h) for h in (0.0, bound - 0.01, bound + 0.01, NAN)] == [
        True,
        True,
        False,
        True,
    ]
    for _ in range(5):
        rule.learn(4, 0, 0.0, 0.0)
    assert not rule.goes_on(1, 0.5, bound - 0.01)
    for _ in range(20):
        rule.learn(4, 4, 0.0, 0.0)
    assert rule.goes_on(1, 0.5, bound + 0.01)


def test_the_heuristic_adds_two_and_takes_one():
    rule = length_rule("heuristic:4/7")
    seen = []
    for agreed in (None, 4, 6, 2, 0):
        if agreed is not None:
            rule.learn(rule.choose(1.0), agreed, 0.0, 0.0)
        seen.append(rule.choose(1.0))
    assert seen == [4, 6, 7, 6, 5]
    rule.learn(2, 2, 0.0, 0.0)  # cut short by the end of the text
    assert rule.choose(1.0) == 5
    for _ in range(9):
        rule.learn(rule.choose(1.0), 0, 0.0, 0.0)
    assert rule.choose(1.0) == 1


@pytest.mark.parametrize(
    ("acceptance", "step", "expected"),
    [(0.98, 0.25, range(7, 16)), (0.80, 0.30, range(1, 6)), (0.30, 0.30, range(1)), (0.90, 1.00, range(1))],
)
def test_the_cost_aware_length_follows_what_pays(acceptance: float, step: float, expected: range):
    lengths, _ = settle(length_rule("adaptive"), always(acceptance), step)
    assert sum(length in expected for length in lengths) >= 0.85 * len(lengths)


@pytest.mark.parametrize("certainty", [mixed, always(0.6), always(0.8), always(0.95)])
def test_the_cost_aware_length_is_near_the_best_fixed_one_or_better(
    certainty: Callable[[np.random.Generator], float],
):
    fixed = min(settle(length_rule(f"fixed:{n}"), certainty, STEP)[1] for n in range(1, 12))
    _, pace = settle(length_rule("adaptive"), certainty, STEP)
    assert pace <= fixed * (0.97 if certainty is mixed else 1.06)


def test_a_draft_that_becomes_good_again_is_found_again():
    rule = length_rule("adaptive")
    assert settle(rule, always(0.05), STEP)[0].count(0) >= 150
    assert settle(rule, always(0.95), STEP)[0].count(0) <= 10


@pytest.mark.parametrize("text", RULES)
def test_a_rule_that_is_shared_learns_from_both_and_mixes_no_rounds(text: str):
    """A sequence whose drafts are always wrong, step by step beside one that rejects nothing."""
    first = length_rule(text)
    second = first.share()
    for number in range(60):
        assert first.choose(1.0) == second.choose(1.0)
        for drafted in (1, 2, 3):  # of the same kind, so that both have survived as well
            assert first.goes_on(drafted, 0.9, 0.3) == second.goes_on(drafted, 0.9, 0.3)
        first.learn(3, 0, 0.6, 1.2)
        second.learn(3, 3 if number < 30 else 0, 0.6, 1.2)
    assert first.choose(1.0) == second.choose(1.0)


def test_the_cost_of_a_pass_is_the_line_through_what_was_measured():
    cost = PassCost()
    assert cost.of(1) == math.inf
    for rows in (2, 4, 8, 3, 5):
        cost.learn(rows, 2.0 + 0.1 * rows)
    assert cost.row == pytest.approx(0.1)
    assert cost.of(1) == pytest.approx(2.1)
    cost.learn(4, 1000.0)  # an interruption
    assert cost.of(1) < 2.6


def test_the_cost_of_a_row_is_guessed_while_all_passes_are_alike():
    cost = PassCost()
    for _ in range(3):
        cost.learn(4, 1.12)
    assert cost.row == pytest.approx(0.04)
    assert cost.of(1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fixed",
        "fixed:0",
        "fixed:3/4",
        "confidence:1",
        "confidence",
        "entropy:1",
        "heuristic",
        "adaptive:3",
        "adaptive/0",
        "adaptive/x",
        "sometimes",
    ],
)
def test_rules_that_are_none_are_refused(text: str):
    with pytest.raises(InputError, match="there is no draft-length rule"):
        length_rule(text)

"""Candidates and predictions: every shape once, variants that differ in one link, and the best of a known clock."""

from __future__ import annotations

import pytest

from specqd.errors import InputError
from specqd.planning.candidates import chains, seeing_all, variants
from specqd.planning.costs import PassCosts
from specqd.planning.prediction import Predictor
from specqd.planning.prompt_file import MOST, builtin_prompts, read_prompts
from specqd.planning.recording import Recording, Run
from specqd.runtime.plan import Plan

TEXT = tuple(range(100, 140))  # nothing recurs


def predictor(agreed: int, draft: float, check: float) -> Predictor:
    """A draft that is right `agreed` times, then wrong; its step takes `draft`, a row more of the target's `check`."""
    runs = {
        n: Run((*TEXT[n : n + agreed], *[-1] * (15 - agreed)), ((0.9, 0.1),) * 15)
        for n in range(2, len(TEXT))
    }
    seconds = {
        (name, rows, again): (took + more * (rows - 1),) * 2
        for name, took, more in (("target", 1.0, check), ("draft", draft, 0.0))
        for rows in range(1, 17)
        for again in (False, True)
    }
    sizes = dict.fromkeys(("target", "draft"), tuple(range(1, 17)))
    shared = dict.fromkeys(("target", "draft"), frozenset({"kv"}))
    recordings = [Recording(1, TEXT, {"draft": runs})] * 2
    return Predictor("target", recordings, PassCosts((0, 50), sizes, seconds, 0.0), shared, frozenset())


def test_the_shapes_of_two_drafts():
    found = [
        str(plan).replace("@adaptive", "").replace("suffix:3", "suffix") for plan in chains("target", "ab")
    ]
    assert len(set(found)) == len(found) == 25
    assert found[0] == "target <- suffix"
    assert {
        "target <- b",
        "target <- suffix | a <- suffix",
        "target <- a <- b",
        "target <- suffix | b <- suffix | a <- suffix",
    } <= set(found)
    assert [str(plan) for plan in chains("target", ())] == ["target <- suffix:3@adaptive"]


def test_variants_differ_in_one_link_and_can_be_read():
    plan = Plan.parse("target <- suffix:3@adaptive | draft@fixed:3 <- suffix:3@fixed:7")
    for depth, place, count in ((0, 0, 15), (0, 1, 8), (1, 0, 15)):
        found = list(variants(plan, depth, place))
        assert len(set(found)) == len(found) == count
        for other in found:
            assert Plan.parse(str(other)) == other
            for d, level in enumerate(plan.levels):
                for p, link in enumerate(level):
                    assert (link == other.levels[d][p]) == ((d, p) != (depth, place))


def test_a_level_that_sees_all_and_the_rest_as_it_was():
    plan = Plan.parse("target <- suffix:3 | draft@fixed:3 <- other")
    found = seeing_all(plan, "draft")
    assert str(found) == "target <- suffix:3@adaptive | draft:whole@fixed:3 <- other@adaptive"
    assert Plan.parse(str(found)) == found == seeing_all(found, "draft")
    assert seeing_all(plan, "target") == plan


@pytest.mark.parametrize(("agreed", "best"), [(2, "fixed:2"), (3, "fixed:3"), (5, "fixed:5"), (8, "fixed:8")])
def test_the_best_length_is_the_run_that_is_right(agreed: int, best: str):
    made = predictor(agreed, draft=0.2, check=0.1)
    (found,) = made.best([Plan.parse("target <- draft@adaptive")], 1, lambda done, of: None)
    assert str(found) == f"target <- draft@{best}"
    rounds = (len(TEXT) - 2) / (agreed + 1)
    assert made.speedup(found) == pytest.approx((agreed + 1) / (1 + 0.3 * agreed), rel=1 / rounds)
    assert made.considered > 8


def test_shapes_are_ranked_and_the_best_kept():
    made = predictor(3, draft=0.2, check=0.1)
    found = made.best(list(chains("target", ["draft"])), 2, lambda done, of: None)
    assert len(found) == 2
    assert made.speedup(found[0]) >= made.speedup(found[1]) > 1
    # The searches find nothing here and cost nearly nothing.
    assert made.speedup(found[0]) == pytest.approx(
        made.speedup(Plan.parse("target <- draft@fixed:3")), rel=0.01
    )


def test_nothing_pays_with_a_draft_as_slow_as_the_target():
    made = predictor(1, draft=1.0, check=0.1)
    assert made.speedup(Plan.parse("target <- draft@fixed:1")) == pytest.approx(2 / 2.1, rel=0.05)
    assert made.speedup(Plan.parse("target")) == 1.0


def test_prompts_of_files(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo words\n")
    assert read_prompts(lines) == (["one", "two words"], False)
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"text": "a\\nb", "id": 3}\n{"text": "c"}\n')
    assert read_prompts(objects) == (["a\nb", "c"], True)
    many = tmp_path / "many.txt"
    many.write_text("\n".join(map(str, range(50))))
    assert read_prompts(many)[0] == ["0", "6", "12", "18", "25", "31", "37", "43"]
    assert len(set(builtin_prompts())) == MOST


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompt: write one in each line"),
        ("a.jsonl", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}\n', 'line 2 of .* is no JSON object with a "text"'),
        ("a.jsonl", b"hello\n", "line 1 of"),
        ("a.jsonl", b'["text"]\n', "line 1 of"),
        ("a.jsonl", b'{"text": ""}\n', "line 1 of"),
        (None, b"", "cannot read prompts from .*No such file"),
        (".", b"", "cannot read prompts from .*Is a directory"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name: str | None, content: bytes, message: str):
    path = tmp_path / (name or "none")
    if name not in {None, "."}:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(path)

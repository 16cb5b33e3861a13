"""`specqd tune`: what it stores and says, what it refuses, and that the artifact changes whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy import compile_toy, save_toy, write_tokenizer

from specqd import artifact
from specqd.artifact import open_artifact, store_plan
from specqd.cli import main
from specqd.errors import ArtifactError, InputError
from specqd.planning import tuning
from specqd.planning.trials import Trial
from specqd.planning.tuning import tune
from specqd.runtime.model import load
from specqd.runtime.plan import Plan

PROMPTS = [[1, 2, 3], [5, 9], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_toy(tmp_path_factory.mktemp("tune"))


@pytest.fixture
def toy(compiled, tmp_path: Path) -> Path:
    files = write_tokenizer(tmp_path)
    save_toy(tmp_path / "a", compiled, files, chain=("target", "draft", "other"), eos_token_ids=())
    return tmp_path / "a"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_the_best_plan_is_stored_and_followed(toy: Path):
    told = []
    found = tune(toy, PROMPTS, new_tokens=40, progress=lambda what, done, of: told.append(what))
    manifest = open_artifact(toy, verify=True).manifest
    assert (manifest.plan, manifest.planned_speedup) == (found.plan, found.predicted)
    assert found.plan in {"target", found.trials[0].plan}
    assert str(load(toy).plan) == found.plan
    assert [trial.measured for trial in found.trials] == sorted(
        (t.measured for t in found.trials), reverse=True
    )
    assert len({trial.plan for trial in found.trials}) == len(found.trials) >= 6
    assert "target <- draft@fixed:3" in {trial.plan for trial in found.trials}  # the plan that it had
    for trial in found.trials:
        assert trial.error == pytest.approx(trial.predicted / trial.measured - 1)
        assert str(Plan.parse(trial.plan)) == trial.plan
    assert (found.prompts, found.tokens) == (3, 120)
    assert [level.name for level in found.levels] == ["target", "draft", "other"]
    assert found.levels[0].acceptance is None
    assert all(
        0.4 < (level.acceptance or 0) < 0.9 for level in found.levels[1:]
    )  # wrong in one of three cases
    assert list(dict.fromkeys(told)) == [
        "recording what each level says",
        "playing plans",
        "trying the best",
    ]


def test_an_artifact_without_drafts_may_still_search(compiled, tmp_path: Path):
    save_toy(tmp_path / "a", compiled, chain=("target",), plan="target", eos_token_ids=())
    found = tune(tmp_path / "a", PROMPTS, new_tokens=40)
    assert [Plan.parse(trial.plan).levels[0][0].name for trial in found.trials] == ["suffix"]


def test_plain_decoding_is_stored_where_nothing_pays(capsys, toy: Path, tmp_path: Path, monkeypatch):
    slow = Trial("target <- draft@fixed:3", predicted=1.2, measured=0.9, tokens_per_s=90.0)
    monkeypatch.setattr(tuning, "compare", lambda *_: [slow])
    (tmp_path / "prompts.txt").write_text("ab\ncd\n")
    code, out, err = command(capsys, "tune", toy, "--prompts", tmp_path / "prompts.txt", "-n", 30)
    assert (code, err) == (0, "")
    assert "no plan pays here" in out
    manifest = open_artifact(toy).manifest
    assert (manifest.plan, manifest.planned_speedup) == ("target", 1.0)
    assert load(toy).generate([1, 2], 5).stats.levels == ()


def test_the_tables_fit_80_columns(capsys, toy: Path, tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("ab", "c" * 99)))
    code, out, err = command(capsys, "tune", toy, "--prompts", tmp_path / "prompts.jsonl", "-n", 30)
    assert (code, err) == (0, "")
    assert (
        max(len(line) for line in out.splitlines() if "stored in" not in line and "no plan" not in line) <= 80
    )
    for word in ("predicted", "measured", "error", "accepted", "2 prompts, 60 tokens"):
        assert word in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tokens", "7"], "7 new tokens say nothing about speed: ask for 8 or more"),
        (["--tokens", "60"], "takes more than the 64 positions that the cache holds"),
        (["--threads", "0"], "cannot run on 0 threads"),
        (["--prompts", "nowhere"], "cannot read prompts from nowhere"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(capsys, toy: Path, options: list[str], sentence: str):
    before = content(toy)
    code, out, err = command(capsys, "tune", toy, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err
    assert content(toy) == before


def test_answers_that_end_at_once_are_refused(compiled, tmp_path: Path):
    save_toy(tmp_path / "a", compiled, eos_token_ids=tuple(range(50)))
    with pytest.raises(InputError, match="ends every answer before 8 tokens"):
        tune(tmp_path / "a", PROMPTS, new_tokens=20)
    with pytest.raises(InputError, match="there are no prompts"):
        tune(tmp_path / "a", [], new_tokens=20)


def test_a_target_that_checks_no_draft_is_refused(compiled, tmp_path: Path):
    single = tuple(f for f in compiled.functions if f.entry == "target" and f.rows == 1)
    save_toy(tmp_path / "a", replace(compiled, functions=single), chain=("target",), plan="target")
    with pytest.raises(InputError, match="plain decoding is all there is"):
        tune(tmp_path / "a", PROMPTS, new_tokens=20)


def test_ctrl_c_leaves_the_artifact_as_it_was(capsys, toy: Path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = content(toy)
    for place in ("record", "run_plans"):
        with monkeypatch.context() as patch:
            patch.setattr(tuning, place, interrupted)
            assert command(capsys, "tune", toy, "-n", "10", "--prompts", _one(toy))[0] == 130
        assert content(toy) == before
    monkeypatch.setattr(artifact.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store_plan(toy, "target", 1.0)
    assert content(toy) == before


def _one(toy: Path) -> Path:
    (toy.parent / "one.txt").write_text("ab\n")
    return toy.parent / "one.txt"


def test_a_plan_that_changes_the_answer_is_not_stored(toy: Path, monkeypatch):
    original = tuning.record
    monkeypatch.setattr(tuning, "record", lambda e, p, a, d: original(e, p, [*a[:-1], (a[-1] + 1) % 50], d))
    before = content(toy)
    with pytest.raises(ArtifactError, match="changes the answer"):
        tune(toy, PROMPTS, new_tokens=20)
    assert content(toy) == before


def test_storing_a_plan_changes_the_manifest_alone(toy: Path):
    before, mode = content(toy), (toy / "specqd.json").stat().st_mode
    store_plan(toy, "target <- suffix:4@fixed:3", 1.5)
    after = content(toy)
    assert {name for name in after if after[name] != before[name]} == {"specqd.json"}
    assert after.keys() == before.keys()
    assert (toy / "specqd.json").stat().st_mode == mode
    changed = open_artifact(toy, verify=True).manifest
    assert changed.model_copy(update={"plan": "", "planned_speedup": None, "digest": ""}) == load(
        toy
    ).engine.manifest.model_copy(update={"plan": "", "planned_speedup": None, "digest": ""})
    assert (changed.plan, changed.planned_speedup) == ("target <- suffix:4@fixed:3", 1.5)


def test_an_artifact_that_cannot_be_written_is_refused_before_the_work(monkeypatch, toy: Path):
    monkeypatch.setattr(artifact.os, "access", lambda path, how: False)
    monkeypatch.setattr(tuning, "load", None)
    with pytest.raises(InputError, match="cannot be written to, so that it can keep no plan"):
        tune(toy, PROMPTS)

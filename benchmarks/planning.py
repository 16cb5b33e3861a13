"""How well `specqd tune` predicts: what it says of chains of all shapes, and what they then measure.

The chains of the list are run as they are, good or not; the planner's own choice is added. All run in turns over the
same prompts, plainly too.

    python benchmarks/planning.py                                # SmolLM2-135M-Instruct
    python benchmarks/planning.py --model FOLDER --sibling FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import machine
import report
from subject import add_options, prepare, prompts

import specqd
from specqd.planning.candidates import chains
from specqd.planning.levels import LevelCost, level_costs
from specqd.planning.prompt_file import MOST
from specqd.planning.trials import Trial, compare
from specqd.planning.tuning import observe, run_beside
from specqd.runtime.model import load
from specqd.runtime.plan import Plan
from specqd.verified import cache_directory

_CHAINS = (
    "target <- draft@fixed:2",
    "target <- draft@fixed:4",
    "target <- draft@fixed:8",
    "target <- draft@confidence:0.6",
    "target <- draft@adaptive",
    "target <- suffix:3@fixed:7",
    "target <- draft@fixed:6 <- suffix:3@fixed:4",
    "target <- suffix:4@adaptive | draft@adaptive <- suffix:3@adaptive",
)
_WITH_SIBLING = (
    "target <- sibling@fixed:5",
    "target <- suffix:4@adaptive | sibling@adaptive",
    "target <- draft@fixed:8 <- sibling@fixed:3",
    "target <- draft@adaptive <- sibling@adaptive <- suffix:3@adaptive",
)
_ROWS = (2, 4, 8, 16)


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    if options.sibling:
        options.artifact = options.artifact or _with_sibling(options.model, options.sibling)
    subject = prepare(options)
    model = load(subject.artifact, options.threads, prefix_sharing=False)
    texts = _spread(prompts(subject, model))
    quiet = machine.Quiet()
    predictor, watch = quiet(lambda: observe(model, texts, options.new_tokens, _untold))
    drafts = model.engine.manifest.chain[1:]
    listed = [Plan.parse(text) for text in (*_CHAINS, *(_WITH_SIBLING if "sibling" in drafts else ()))]
    chosen = predictor.best(
        [plan for plan in chains(predictor.target, drafts) if plan not in listed], 1, lambda done, of: None
    )
    played = predictor.considered
    plans = [Plan(predictor.target), *listed, *chosen]
    rates, predictor = quiet(lambda: run_beside(model, predictor, watch, plans, _untold))
    trials, plain = compare(predictor, rates), median(rates[plans[0]])
    details = {
        "model": subject.name,
        "prompts": len(predictor.recordings),
        "new tokens, at most": options.new_tokens,
        "plans played": played,
        "threads": model.engine.threads,
        "isa": model.engine.manifest.isa,
        "identical": True,
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    tables = [_levels(level_costs(predictor, model.engine.manifest.chain)), _trials(trials, plain)]
    report.write(f"planning-{subject.name}", tables, details, [vars(trial) for trial in trials], options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare what the planner predicts with what is measured.")
    add_options(parser)
    parser.add_argument(
        "--sibling", type=Path, help="smaller checkpoint with the tokenizer of --model, for more chains"
    )
    parser.add_argument("-n", "--new-tokens", type=int, default=128, help="new tokens a prompt")
    report.add_options(parser)
    return parser.parse_args()


def _with_sibling(checkpoint: Path, sibling: Path) -> Path:
    target = cache_directory() / "benchmarks" / checkpoint.name / "planning.specqd"
    specqd.compile(checkpoint, target, drafts={"sibling": sibling}, context=1024, force=True)
    return target


def _untold(what: str, done: int, of: int) -> None:
    pass


def _spread(texts: Sequence[list[int]]) -> list[list[int]]:
    count = min(MOST, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def _levels(levels: Sequence[LevelCost]) -> report.Table:
    rows = [
        [
            level.name,
            "" if level.acceptance is None else f"{level.acceptance:.3f}",
            f"{level.step:.3f}",
            *(f"{level.passes[count]:.2f}" for count in _ROWS),
        ]
        for level in levels
    ]
    headings = ["level", "accepted", "step (c)", *(f"{count} rows" for count in _ROWS)]
    title = "Levels alone; passes over a plain step of the target:"
    return report.Table(title, headings, rows, {"levels": {level.name: vars(level) for level in levels}})


def _trials(trials: Sequence[Trial], plain: float) -> report.Table:
    rows = [
        [
            f"`{_cell(one.plan)}`",
            f"{one.predicted:.2f}",
            f"{one.measured:.2f}",
            f"{one.error:+.1%}",
            f"{one.tokens_per_s:.1f}",
        ]
        for one in trials
    ]
    rows.append(["plain", "", "1.00", "", f"{plain:.1f}"])
    worst = max(abs(one.error) for one in trials)
    headings = ["plan (the last is the planner's)", "predicted", "measured", "error", "tokens/s"]
    title = f"Times faster than plain decoding, geometric mean over the prompts; largest error {worst:.1%}:"
    return report.Table(title, headings, rows, {"largest error": worst, "plain tokens/s": plain})


def _cell(text: str) -> str:
    """Write a plan so that its bars do not end the cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()

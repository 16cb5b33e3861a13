"""What each way to make a draft does to its acceptance and to the cost of its step.

The same model is compiled with each draft; the drafts then answer the same prompts, in turns, with fixed draft lengths.

    python benchmarks/acceptance.py                              # SmolLM2-135M-Instruct
    python benchmarks/acceptance.py --model FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import machine
import report
from compiled import Compiled, Sample
from subject import Subject, add_options, prepare, prompts

import specqd
from specqd.build import default_pipeline

_LENGTHS = (1, 4)
_CAST = "cast-mxfp4{scale=search}"  # as in the default pipeline
_DRAFTS = {
    "cast-mxfp4{scale=floor}": "draft: cast-mxfp4{scale=floor}",
    "cast-mxfp4{scale=search}": f"draft: {_CAST}",
    "cast-mxfp4{scale=search, lm_head=mxfp4}": "draft: cast-mxfp4{scale=search, lm_head=mxfp4}",
    "refine-head, cast-mxfp4{scale=search}": f"draft: refine-head, draft: {_CAST}",
    "calibrate-mxfp4": "draft: calibrate-mxfp4",
    "refine-head, calibrate-mxfp4": "draft: refine-head, draft: calibrate-mxfp4",
    "cast-int8": "draft: cast-int8",
    **{
        f"trim-vocabulary{{tokens={n}}}, {_CAST}": f"draft: trim-vocabulary{{tokens={n}}}, draft: {_CAST}"
        for n in (8192, 16384, 24576)
    },
    **{
        f"{pruned}, {cast}": f"draft: {pruned}, draft: {cast}"
        for pruned in (f"sparsify{{sparsity={share},allocation=uniform}}" for share in (0.5, 0.65))
        for cast in ("cast-int8", _CAST)
    },
}


def main() -> None:
    """Compile, measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    drafts = {n: text for n, text in _DRAFTS.items() if any(part in n for part in options.only or [""])}
    made = {name: Compiled(_compile(subject, text), options.threads) for name, text in drafts.items()}
    first = next(iter(made.values()))
    texts = prompts(subject, first.model)[: options.answers]
    quiet = machine.Quiet()
    rounds = [
        {
            f"{name}, {length}": quiet(lambda c=one, n=length, t=text: _draft(c, t, options.new_tokens, n))
            for name, one in made.items()
            for length in _LENGTHS
        }
        | {f"{name}, steps": one.passes(text, len(text), 2) for name, one in made.items()}
        for text in texts
    ]
    details = {
        "model": subject.name,
        "prompts": len(texts),
        "new tokens": options.new_tokens,
        "threads": first.engine.threads,
        "isa": first.engine.manifest.isa,
        "identical": all(one.identical for one in made.values()),
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write(f"acceptance-{subject.name}", [_table(rounds, list(drafts))], details, rounds, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to make a draft.")
    add_options(parser)
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="measure only drafts with TEXT in their name"
    )
    parser.add_argument("--answers", type=int, help="prompts to answer (default: all)")
    parser.add_argument("-n", "--new-tokens", type=int, default=128, help="new tokens a prompt")
    report.add_options(parser)
    return parser.parse_args()


def _compile(subject: Subject, draft: str) -> Path:
    usual = default_pipeline(1024)
    if f"draft: {_CAST}" not in usual:
        raise SystemExit(f"the default pipeline casts its draft otherwise than by {_CAST}: {usual}")
    if draft == f"draft: {_CAST}":
        return subject.artifact
    target = subject.made / f"acceptance-{list(_DRAFTS.values()).index(draft)}.specqd"
    pipeline = usual.replace(f"draft: {_CAST}", draft)
    specqd.compile(subject.checkpoint, target, pipeline=pipeline, force=True)
    return target


def _draft(compiled: Compiled, prompt: list[int], new_tokens: int, length: int) -> Sample:
    return compiled.decode(prompt, new_tokens, f"{compiled.target} <- {compiled.draft}@fixed:{length}")


def _table(rounds: list[dict[str, Sample]], drafts: list[str]) -> report.Table:
    rows, figures = [], {}
    for name in drafts:
        rates, per_pass = [], 0.0
        for length in _LENGTHS:
            samples = [done[f"{name}, {length}"] for done in rounds]
            rates.append(sum(s["accepted"] for s in samples) / sum(s["examined"] for s in samples))
            per_pass = sum(s["new"] for s in samples) / sum(s["verified"] for s in samples)
        steps = [done[f"{name}, steps"] for done in rounds]
        cost = median(step["draft"] / step["1"] for step in steps)
        rows.append([f"`{name}`", *(f"{rate:.3f}" for rate in rates), f"{per_pass:.2f}", f"{cost:.2f}"])
        figures[name] = {
            "acceptance": rates,
            "tokens a verify pass": per_pass,
            "draft step of a plain step": cost,
        }
    headings = [
        "draft",
        *(f"accepted, {n} drafted" for n in _LENGTHS),
        "tokens a verify pass",
        "draft step (c)",
    ]
    title = "Drafts of the same target on the same prompts; c is a draft step over a plain step of the same round:"
    return report.Table(title, headings, rows, figures)


if __name__ == "__main__":
    main()

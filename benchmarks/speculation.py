"""What a draft gains over all prompts: the figure to quote, because acceptance differs from prompt to prompt.

Every prompt is answered plainly and by the artifact's own plan, greedily and sampled, in turns, the order changing
from prompt to prompt. `decode.py` tries more draft lengths on a few prompts; those few are no fair sample.

    python benchmarks/speculation.py                             # SmolLM2-135M-Instruct, 26 chat prompts
    python benchmarks/speculation.py --model FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import quantiles
from typing import Any

import machine
import report
from compiled import Compiled, Sample
from subject import add_options, prepare, prompts

from specqd.runtime.sampling import Sampling

_TEMPERATURE = 0.8


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    compiled = Compiled(subject.artifact, options.threads)
    plan = options.plan or compiled.plan
    texts = prompts(subject, compiled.model)[: options.answers]
    compiled.decode(texts[0], 8, plan)  # reads the weights from disk
    quiet = machine.Quiet()
    answers = [_answers(compiled, quiet, text, options.new_tokens, plan, i) for i, text in enumerate(texts)]
    details = {
        "model": subject.name,
        "prompts": len(texts),
        "prompt tokens": f"{min(map(len, texts))} to {max(map(len, texts))}",
        "new tokens": options.new_tokens,
        "plan": plan,
        "threads": compiled.engine.threads,
        "isa": compiled.engine.manifest.isa,
        "identical": compiled.identical,
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write(f"speculation-{subject.name}", [_table(answers)], details, answers, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare speculative and plain decoding over all prompts.")
    add_options(parser)
    parser.add_argument("--answers", type=int, help="prompts to answer (default: all)")
    parser.add_argument("--plan", help="levels that draft (default: the artifact's plan)")
    parser.add_argument("-n", "--new-tokens", type=int, default=256, help="new tokens a prompt")
    report.add_options(parser)
    return parser.parse_args()


def _answers(
    compiled: Compiled, quiet: machine.Quiet, prompt: list[int], new_tokens: int, plan: str, number: int
) -> dict[str, Sample]:
    """Answer one prompt plainly and by the plan, greedily and sampled with the prompt's number as seed."""
    done = {}
    for prefix, sampling in (("", None), ("sampled ", Sampling(_TEMPERATURE, seed=number))):
        order = [("plain", compiled.target), ("speculative", plan)]
        for name, chain in reversed(order) if number % 2 else order:
            done[prefix + name] = quiet(partial(compiled.decode, prompt, new_tokens, chain, sampling))
    return done


def _table(answers: Sequence[dict[str, Sample]]) -> report.Table:
    gains = [_gain(one) for one in answers]
    drafted = [one["speculative"] for one in answers]
    figures: dict[str, Any] = {
        "plain tokens/s": report.spread(one["plain"]["tokens/s"] for one in answers),
        "speculative tokens/s": report.spread(one["tokens/s"] for one in drafted),
        "speed-up": report.spread(gains),
        "acceptance of a prompt": report.spread(one["accepted"] / one["examined"] for one in drafted),
    }
    rows = [[name, value.show(1 if "tokens/s" in name else 2)] for name, value in figures.items()]
    pooled, each_pass = _ratio(drafted, "accepted", "examined"), _ratio(drafted, "new", "verified")
    slower = sum(gain < 1 for gain in gains)
    rows += [
        ["acceptance of all tokens", f"{pooled:.3f}"],
        ["tokens a verify pass", f"{each_pass:.2f}"],
        ["prompts that got slower", f"{slower} of {len(gains)}"],
    ]
    extra = {"acceptance": pooled, "tokens a verify pass": each_pass, "slower": slower}
    if len(gains) > 1:
        low, _, high = quantiles(gains, n=4)
        rows.insert(3, ["middle half of the speed-ups", f"{low:.2f}-{high:.2f}"])
        extra["quartiles"] = [low, high]
    for name, value in _kinds(answers).items():
        figures[name] = value
        share = name.startswith("time")
        rows.append([name, value.show(3 if share or name.startswith("acceptance") else 2)])
    title = (
        "Speculative against plain decoding, median over the prompts (lowest-highest). An answer ends in a loop if its "
        "last 64 tokens repeat themselves every 32 or fewer; all rows but the sampled ones are greedy:"
    )
    return report.Table(title, ["", "median (range)"], rows, {**figures, **extra})


def _kinds(answers: Sequence[dict[str, Sample]]) -> dict[str, report.Spread]:
    """What looping gains, what sampling costs, and what is spent outside compiled code."""
    found = {}
    for name, loops in (("do not end in a loop", 0), ("end in a loop", 1)):
        if alike := [_gain(one) for one in answers if one["plain"]["loops"] == loops]:
            found[f"speed-up of the {len(alike)} answers that {name}"] = report.spread(alike)
    sampled = [one["sampled speculative"] for one in answers]
    found |= {
        f"speed-up, sampled at temperature {_TEMPERATURE}": report.spread(
            _gain(one, "sampled ") for one in answers
        ),
        "acceptance of a prompt, sampled": report.spread(
            one["accepted"] / one["examined"] for one in sampled
        ),
    }
    for name in ("plain", "speculative", "sampled plain", "sampled speculative"):
        found[f"time outside compiled code, {name}"] = report.spread(one[name]["outside"] for one in answers)
    return found


def _gain(one: dict[str, Sample], prefix: str = "") -> float:
    return one[f"{prefix}speculative"]["tokens/s"] / one[f"{prefix}plain"]["tokens/s"]


def _ratio(samples: Sequence[Sample], above: str, below: str) -> float:
    return sum(one[above] for one in samples) / sum(one[below] for one in samples)


if __name__ == "__main__":
    main()

"""What a draft gains over all prompts: the figure to quote, because acceptance differs from prompt to prompt.

Every prompt is answered plainly and by the artifact's own plan, in turns, the order changing from
prompt to prompt. `decode.py` tries more draft lengths on a few prompts; those few are no fair sample.

    python benchmarks/speculation.py                             # SmolLM2-135M-Instruct, 26 chat prompts
    python benchmarks/speculation.py --model FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import quantiles

import machine
import report
from compiled import Compiled, Sample
from subject import add_options, prepare, prompts


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    compiled = Compiled(subject.artifact, options.threads)
    plan = options.plan or compiled.plan
    texts = prompts(subject, compiled.model)[: options.answers]
    compiled.decode(texts[0], 8, plan)  # reads the weights from disk
    quiet = machine.Quiet()
    pairs = [_pair(compiled, quiet, text, options.new_tokens, plan, i) for i, text in enumerate(texts)]
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
    report.write(f"speculation-{subject.name}", [_table(pairs)], details, pairs, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare speculative and plain decoding over all prompts.")
    add_options(parser)
    parser.add_argument("--answers", type=int, help="prompts to answer (default: all)")
    parser.add_argument("--plan", help="levels that draft (default: the artifact's plan)")
    parser.add_argument("-n", "--new-tokens", type=int, default=256, help="new tokens a prompt")
    report.add_options(parser)
    return parser.parse_args()


def _pair(
    compiled: Compiled, quiet: machine.Quiet, prompt: list[int], new_tokens: int, plan: str, number: int
) -> dict[str, Sample]:
    order = [("plain", compiled.target), ("speculative", plan)]
    if number % 2:
        order.reverse()
    return {name: quiet(partial(compiled.decode, prompt, new_tokens, chain)) for name, chain in order}


def _table(pairs: Sequence[dict[str, Sample]]) -> report.Table:
    gains = [pair["speculative"]["tokens/s"] / pair["plain"]["tokens/s"] for pair in pairs]
    drafted = [pair["speculative"] for pair in pairs]
    rates = [one["accepted"] / one["examined"] for one in drafted]
    total = {key: sum(one[key] for one in drafted) for key in ("accepted", "examined", "new", "verified")}
    figures = {
        "plain tokens/s": report.spread(pair["plain"]["tokens/s"] for pair in pairs),
        "speculative tokens/s": report.spread(one["tokens/s"] for one in drafted),
        "speed-up": report.spread(gains),
        "acceptance of a prompt": report.spread(rates),
    }
    rows = [[name, value.show(1 if "tokens/s" in name else 2)] for name, value in figures.items()]
    pooled = total["accepted"] / total["examined"]
    each_pass = total["new"] / total["verified"]
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
    title = "Speculative against plain decoding, median over the prompts (lowest-highest):"
    return report.Table(title, ["", "median (range)"], rows, {**figures, **extra})


if __name__ == "__main__":
    main()

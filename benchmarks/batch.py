"""Sequences decoded together against the same ones one after the other, and whether their tokens are the same.

In each round a batch of prompts is answered one by one and then together, both plainly and by the artifact's plan; the
next round takes the next prompts. Time is that of whole answers, prompts included.

    python benchmarks/batch.py                                   # SmolLM2-135M-Instruct, 26 chat prompts
    python benchmarks/batch.py --model FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import machine
import report
from subject import add_options, prepare, prompts

from specqd.runtime.model import Generation, Model, load

Sample = dict[str, float]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    model = load(subject.artifact, options.threads, sequences=max(options.sequences), prefix_sharing=False)
    texts = prompts(subject, model)
    model.generate_many(texts[: max(options.sequences)], 4)  # reads the weights from disk
    quiet = machine.Quiet()
    rounds: dict[int, list[Sample]] = {count: [] for count in options.sequences}
    for number in range(options.rounds):
        for count, samples in rounds.items():
            chosen = [texts[(number * count + i) % len(texts)] for i in range(count)]
            samples.append(_round(model, quiet, chosen, options.new_tokens))
    details = {
        "model": subject.name,
        "rounds": options.rounds,
        "prompt tokens": f"{min(map(len, texts))} to {max(map(len, texts))}",
        "new tokens": options.new_tokens,
        "plan": str(model.plan),
        "threads": model.engine.threads,
        "isa": model.engine.manifest.isa,
        "identical": all(sample["identical"] for samples in rounds.values() for sample in samples),
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write(f"batch-{subject.name}", [_table(rounds)], details, rounds, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare sequences decoded together and one by one.")
    add_options(parser)
    parser.add_argument("--sequences", type=int, nargs="+", default=[2, 4, 8, 16], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=3, help="batches of each size")
    parser.add_argument("-n", "--new-tokens", type=int, default=96, help="new tokens a prompt")
    report.add_options(parser)
    return parser.parse_args()


def _round(model: Model, quiet: machine.Quiet, texts: list[list[int]], new_tokens: int) -> Sample:
    def alone(speculate: bool) -> list[Generation]:
        return [model.generate(t, new_tokens, speculate=speculate, ignore_eos=True) for t in texts]

    def together(speculate: bool) -> list[Generation]:
        return model.generate_many(texts, new_tokens, speculate=speculate, ignore_eos=True)

    sample: Sample = {"identical": True}
    tokens = None
    for name, answer in (("alone", alone), ("together", together)):
        for how, speculate in (("plain", False), ("plan", True)):
            measured = quiet(partial(_timed, partial(answer, speculate)))
            made = measured.pop("made")
            tokens = tokens or [one.tokens for one in made]
            sample["identical"] &= [one.tokens for one in made] == tokens
            sample[f"{name}, {how}"] = sum(len(one.tokens) for one in made) / measured["seconds"]
    return sample


def _timed(work: Callable[[], list[Generation]]) -> dict:
    began = time.perf_counter()
    made = work()
    return {"made": made, "seconds": time.perf_counter() - began}


def _table(rounds: dict[int, list[Sample]]) -> report.Table:
    rows, figures = [], {}
    names = ("alone, plain", "alone, plan", "together, plain", "together, plan")
    for count, samples in rounds.items():
        shown = {name: report.spread(s[name] for s in samples) for name in names}
        gain = report.spread(
            max(s["together, plain"], s["together, plan"]) / max(s["alone, plain"], s["alone, plan"])
            for s in samples
        )
        rows.append([str(count), *(shown[name].show(0) for name in names), gain.show(2)])
        figures[str(count)] = gain
    title = "Tokens/s of all sequences, median over the rounds (lowest-highest):"
    head = ["sequences", *names, "best together / best alone"]
    return report.Table(title, head, rows, figures)


if __name__ == "__main__":
    main()

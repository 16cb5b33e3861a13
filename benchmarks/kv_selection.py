"""What selecting positions of the cache does to speed, for a draft alone and in the target, by the length of the text.

For each length a text is read and continued: plainly, by a draft that sees everything, by one that sees what
`select-kv` selects, and plainly by a target that keeps only that. The first three must give the same tokens.
Selections are charged with what their passes take beyond a plain step, and with what follows the pass.

    python benchmarks/kv_selection.py                            # SmolLM2-135M-Instruct; texts: the project's own pages
    python benchmarks/kv_selection.py --model FOLDER --texts A.txt B.txt
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import machine
import report
from kv_plot import plot_time
from subject import checkpoint, compiled

from specqd.build import default_pipeline
from specqd.manifest import OBSERVER
from specqd.runtime.model import Model, load

_PAGES = ("docs/architecture.md", "benchmarks/README.md", "README.md", "docs/write-a-pass.md")
_PLAN = "target <- draft@fixed:{}"
Sample = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    most = max(options.lengths) + options.new_tokens + 64
    sizes = f"tokens={options.tokens},every={options.every}"
    steps = {"draft": f"draft: select-kv{{{sizes}}}", "target": f"select-kv{{method=kvcrush,{sizes}}}"}
    folder = checkpoint(options.model)
    models = {
        where: load(
            compiled(folder, f"selecting-{where}", f"{default_pipeline(most)}, {step}"),
            options.threads,
            prefix_sharing=False,
        )
        for where, step in steps.items()
    }
    texts = _texts(options, models["draft"])
    quiet, samples = machine.Quiet(), []
    for number in range(options.rounds):
        for length in options.lengths:
            known = [text for text in texts if len(text) >= length]
            text = known[number % len(known)][:length]
            samples.append(_round(models, quiet, text, options))
    details = {
        "model": folder.name,
        "rounds": options.rounds,
        "new tokens": options.new_tokens,
        "kept tokens": options.tokens,
        "selected every": options.every,
        "plan": _PLAN.format(options.draft_length),
        "threads": models["draft"].engine.threads,
        "isa": models["draft"].engine.manifest.isa,
        "identical": all(sample["identical"] for sample in samples),
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    rows = [row for sample in samples for row in _rows(sample, options)]
    name = f"kv-selection-{folder.name}"
    report.write(name, [_table(samples)], details, samples, options, rows)
    plot_time(samples, options.output / f"{name}.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what selecting positions of the cache does to speed."
    )
    parser.add_argument("--model", type=Path, help="BF16 Hugging Face folder (default: SmolLM2, fetched)")
    parser.add_argument(
        "--texts", type=Path, nargs="+", help="UTF-8 files (default: the project's own pages)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 7000], help="of the texts, in tokens"
    )
    parser.add_argument("--tokens", type=int, default=512, help="positions that are kept")
    parser.add_argument("--every", type=int, default=512, help="positions between two selections")
    parser.add_argument("--draft-length", type=int, default=3, help="tokens drafted at once")
    parser.add_argument("--rounds", type=int, default=3, help="texts of each length")
    parser.add_argument("-n", "--new-tokens", type=int, default=1100, help="new tokens a text")
    parser.add_argument("--quick", action="store_true", help="one round of two lengths, 160 new tokens")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.new_tokens, options.lengths = 1, 160, [min(options.lengths), 4000]
    return options


def _texts(options: argparse.Namespace, model: Model) -> list[list[int]]:
    root = Path(__file__).parent.parent
    pages = [file.read_text("utf-8") for file in options.texts or [root / page for page in _PAGES]]
    whole = [model.encode(page, raw=True) for page in pages]
    # A text that is too short goes on with those after it.
    joined = [[token for page in whole[i:] + whole[:i] for token in page] for i in range(len(whole))]
    longest = max(options.lengths)
    if len(joined[0]) < longest:
        raise SystemExit(
            f"the texts have {len(joined[0])} tokens together, and {longest} are asked for: give more `--texts`"
        )
    return joined


def _round(
    models: dict[str, Model], quiet: machine.Quiet, text: list[int], options: argparse.Namespace
) -> Sample:
    sample: Sample = {"length": len(text)}
    plan = _PLAN.format(options.draft_length)
    cases = {
        "plain": ("draft", None, False),
        "draft, all": ("draft", plan, False),
        "draft, selected": ("draft", plan, True),
        "target, selected": ("target", None, True),
    }
    tokens, count = {}, options.new_tokens
    for name, (where, by, selects) in cases.items():
        made = quiet(
            lambda where=where, by=by, selects=selects: _answer(models[where], text, count, by, selects)
        )
        tokens[name] = made.pop("made")
        sample[name] = made
    sample["identical"] = tokens["plain"] == tokens["draft, all"] == tokens["draft, selected"]
    return sample


def _answer(model: Model, text: list[int], new_tokens: int, plan: str | None, selects: bool) -> Sample:
    """Answer once; `selection`: share of the time after the prompt that selections took, None if there were none.

    A selection gives a token as well, and is charged with what it takes beyond the time of a token on average.
    `prompt`: share of the prompt's time that its selection took, its pass included, which feeds 4 or 16 tokens of it.
    """
    engine = model.engine
    feed, spent = engine.feed_pieces, list[float]()

    def timed(entry: str, pieces: Any) -> Any:
        began = time.perf_counter()
        output = feed(entry, pieces)
        if entry == OBSERVER:
            spent.append(time.perf_counter() - began)
        return output

    engine.feed_pieces = timed  # type: ignore[method-assign]
    if not selects:
        engine.schedule = lambda: None  # type: ignore[method-assign]
    try:
        answer = model.generate(text, new_tokens, plan=plan, speculate=plan is not None, ignore_eos=True)
    finally:
        del engine.feed_pieces
        engine.__dict__.pop("schedule", None)
    stats = answer.stats
    of_prompt = [spent.pop(0)] if len(text) > engine.manifest.selection.above and selects else []
    token = stats.decode_seconds / new_tokens
    return {
        "made": answer.tokens,
        "tokens/s": stats.decode_tokens_per_s,
        "acceptance": stats.acceptance_rate,
        "prefill s": stats.prefill_seconds,
        "selection": sum(seconds - token for seconds in spent) / stats.decode_seconds if spent else None,
        "prompt": sum(of_prompt) / stats.prefill_seconds if of_prompt else None,
    }


def _table(samples: list[Sample]) -> report.Table:
    rows, figures = [], {}
    for length in dict.fromkeys(sample["length"] for sample in samples):
        of_length = [sample for sample in samples if sample["length"] == length]
        rates = {
            name: report.spread(sample[name]["tokens/s"] for sample in of_length)
            for name in ("plain", "draft, all", "draft, selected", "target, selected")
        }
        gain = report.spread(
            s["draft, selected"]["tokens/s"] / s["draft, all"]["tokens/s"] for s in of_length
        )
        accepted = [
            report.spread(s[name]["acceptance"] for s in of_length)
            for name in ("draft, all", "draft, selected")
        ]
        prefill, cost = (
            [_share(s[f"{where}, selected"][of] for s in of_length) for where in ("draft", "target")]
            for of in ("prompt", "selection")
        )
        rows.append(
            [
                str(length),
                *(rate.show(1) for rate in rates.values()),
                gain.show(2),
                " / ".join(f"{one.median:.3f}" for one in accepted),
                " / ".join(f"{one.median:.2%}" if one else "none" for one in prefill),
                " / ".join(f"{one.median:.2%}" if one else "none" for one in cost),
            ]
        )
        figures[str(length)] = {"gain": gain, "prefill": prefill[-1], "selection": cost[-1], **rates}
    title = "Tokens/s after a text of so many tokens, median over the rounds (lowest-highest):"
    head = [
        "tokens", "plain", "draft sees all", "draft sees the selected", "target keeps the selected",
        "selected / all", "acceptance, all / selected", "of the prompt's time, draft / target",
        "of the time after it, draft / target",
    ]  # fmt: skip
    return report.Table(title, head, rows, figures)


def _share(of: Iterable[float | None]) -> report.Spread | None:
    known = [one for one in of if one is not None]
    return report.spread(known) if known else None


def _rows(sample: Sample, options: argparse.Namespace) -> list[Sample]:
    """Rows as those of kv_quality.py."""
    kept = min(options.tokens, sample["length"]) / sample["length"]
    shared = {
        "tokens_ratio": kept,
        "bytes_ratio": kept,
        "ppl_loss": None,
        "top1": None,
        "retrieval": None,
        "seed": 0,
    }
    methods = {"draft": ("snapkv", None), "target": ("kvcrush", "snapkv")}
    return [
        {
            "method": method,
            "scorer": scorer,
            "where": where,
            **shared,
            "selection_cost": sample[f"{where}, selected"]["selection"],
            "prefill_cost": sample[f"{where}, selected"]["prompt"],
            "tokens_per_s": sample[f"{where}, selected"]["tokens/s"],
        }
        for where, (method, scorer) in methods.items()
    ]


if __name__ == "__main__":
    main()

"""What does a smaller KV cache cost in quality? Every selection method at equal total tokens, against the full cache.

Each text is read once. Then, for every method, size and format, the cache of its beginning is compressed and the
same tokens are predicted from it in one pass, at their true positions. Long prompts give perplexity, top-1
agreement and KL divergence; needles in unrelated text give retrieval, over the questions that the full cache
answers. What is done is kept sample by sample: an interrupted run goes on where it was.

    python benchmarks/kv_quality.py --texts FILE.jsonl            # SmolLM2; lines with "id" and a long "text"
    python benchmarks/kv_quality.py --texts FILE.jsonl --quick    # one seed and size, few methods
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kv_tables
import report
import torch
import transformers
from kv_model import CacheModel, Layer, Read
from kv_plot import plot
from kv_tasks import LONG, Sample, long_prompts, retrieval
from kv_variants import ASKED, QUICK, VARIANTS, WINDOW, Variant, compress, named
from torch import Tensor

from specqd.selection import keep
from specqd.verified import cache_directory

_SCORED = 128  # tokens of a long prompt that are predicted from each cut
_TOGETHER = 6  # caches of the same lengths that go through the model in one pass
_UNSOLVED = Variant("unsolved", "unsolved")  # a row that says that the full cache does not find the answer
_QUESTIONS = {1000: 10, 2000: 8, 4000: 3, 7500: 1}  # tokens of a text: seeds of each kind of question


def main() -> None:
    """Measure what is not yet known, then print and write what `report` writes."""
    options = _options()
    folder = options.model or _fetched()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(
        "medium"
    )  # products round to BF16 what they take, as compiled code does
    done = _Done(options.kept or cache_directory() / "benchmarks" / folder.name / "kv_quality.jsonl")
    samples, variants = _work(options, tokenizer)
    model = CacheModel(folder)
    until = time.monotonic() + (float("inf") if options.seconds is None else options.seconds)
    left = [sample for sample in samples if not done.covers(sample, variants(sample))]
    while left and time.monotonic() < until:
        done.add(measure(model, left[0], variants(left.pop(0)), done))
    if left:
        print(f"{len(left)} of {len(samples)} texts are left; run again to go on")
    if not done.costs:
        done.add([_costs(model, next(sample for sample in samples if sample.task == LONG))])
    dim = model.model.config.head_dim
    known = [row for row in done.rows if row["method"] != "unsolved"]
    details = {
        "model": folder.name,
        "texts": options.texts.name,
        "cuts of a long prompt": len({row["seed"] for row in known if row["task"] == LONG}),
        "tokens scored after a cut": _SCORED,
        "questions that the full cache answers": _answered(done.rows),
        "queries seen": WINDOW,
        "complete": not left,
    }
    name = f"kv_quality-{folder.name}{'-quick' if options.quick else ''}"
    tables = kv_tables.tables(known, done.costs, dim)
    report.write(name, tables, details, kv_tables.rows(known, done.costs, dim), options)
    plot(known, dim, options.output / f"{name}.png")


def _answered(rows: list[dict[str, Any]]) -> list[str]:
    asked = {(row["task"], row["name"], row["seed"]) for row in rows if row["task"] != LONG}
    lost = Counter(row["name"] for row in rows if row["method"] == "unsolved")
    counts = Counter(name for _, name, _ in asked)
    return [f"{counts[name] - lost[name]} of {counts[name]} {name}" for name in sorted(counts)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to make the KV cache smaller.")
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: SmolLM2, fetched)")
    parser.add_argument("--texts", type=Path, required=True, help='JSON lines with "id" and "text"')
    parser.add_argument("--seeds", type=int, default=5, help="cuts of each long prompt, and random draws")
    parser.add_argument("--asked-after", action="store_true", help="retrieval: also ask after compressing")
    parser.add_argument("--quick", action="store_true", help="one seed and size, few methods, short texts")
    parser.add_argument("--seconds", type=float, help="start no further text after so long")
    parser.add_argument("--kept", type=Path, help="file of finished samples (default: in the cache folder)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    report.add_options(parser)
    options = parser.parse_args()
    options.seeds = 1 if options.quick else options.seeds
    return options


def _fetched() -> Path:
    folder = cache_directory() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        from specqd.frontends.smollm2 import fetch

        fetch(folder)
    return folder


def _work(
    options: argparse.Namespace, tokenizer: Any
) -> tuple[list[Sample], Callable[[Sample], list[Variant]]]:
    long = long_prompts(options.texts, tokenizer, max(options.seeds, 5), _SCORED)
    counts = {1000: 2} if options.quick else _QUESTIONS
    samples = [sample for sample in long if sample.seed < options.seeds]
    samples += retrieval(tokenizer, counts, asked_before=True)
    if options.asked_after:
        samples += retrieval(tokenizer, counts, asked_before=False)

    def variants(sample: Sample) -> list[Variant]:
        return QUICK if options.quick else VARIANTS if sample.task == LONG else ASKED

    return sorted(samples, key=lambda sample: (sample.task == LONG, sample.seed)), variants


class _Done:
    """Rows of finished samples, one JSON object a line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        self._all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for row in self._all if "costs" not in row]

    @property
    def costs(self) -> dict[str, float]:
        return next((row["costs"] for row in self._all if "costs" in row), {})

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._all += rows
        with self.file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)

    def known(self, sample: Sample) -> set[tuple[Any, ...]]:
        """Keys of the variants that this sample was measured with."""
        return {
            (row["method"], row["scorer"], row["ratio"], row["format"], row["newest"])
            for row in self.rows
            if (row["task"], row["name"], row["seed"]) == (sample.task, sample.name, sample.seed)
        }

    def covers(self, sample: Sample, variants: list[Variant]) -> bool:
        known = self.known(sample)
        return _key(_UNSOLVED) in known or {_key(v) for v in variants} <= known


def _key(variant: Variant) -> tuple[Any, ...]:
    return tuple(asdict(variant).values())


def measure(model: CacheModel, sample: Sample, variants: list[Variant], done: _Done) -> list[dict[str, Any]]:
    """Return a row for each variant, or one that says that the full cache does not answer the question."""
    facts = {"task": sample.task, "name": sample.name, "seed": sample.seed}
    told = sample.tokens[: sample.scored.stop - 1]
    targets = torch.tensor([sample.tokens[at] for at in sample.scored])
    read = model.read(told, [at - 1 for at in sample.scored])
    if sample.task != LONG and not read.logits.argmax(-1).equal(targets):
        return [facts | asdict(_UNSOLVED)]
    known = done.known(sample)
    return [
        facts | row for row in _compare(model, sample, read, [v for v in variants if _key(v) not in known])
    ]


def _compare(
    model: CacheModel, sample: Sample, read: Read, variants: list[Variant]
) -> Iterator[dict[str, Any]]:
    targets = torch.tensor([sample.tokens[at] for at in sample.scored])
    told = sample.tokens[sample.end : sample.scored.stop - 1]
    seen, scorers = read.observed(sample.end, WINDOW), {}
    full = read.logits.log_softmax(-1)

    def measured(alike: list[tuple[Variant, list[Layer]]]) -> Iterator[dict[str, Any]]:
        logits = model.extend([past for _, past in alike], told, sample.end)[:, -len(targets) :]
        for (variant, _), of in zip(alike, logits, strict=True):
            yield asdict(variant) | _distances(full, of.log_softmax(-1), targets)

    waiting: dict[tuple[int, ...], list[tuple[Variant, list[Layer]]]] = {}
    for variant in variants:
        past = compress(variant, scorers, seen, read, sample.seed)
        alike = waiting.setdefault(tuple(layer.keys.shape[1] for layer in past), [])
        alike.append((variant, past))
        if len(alike) == _TOGETHER:
            yield from measured(alike)
            alike.clear()
    for alike in filter(None, waiting.values()):
        yield from measured(alike)


def _distances(full: Tensor, logits: Tensor, targets: Tensor) -> dict[str, float | bool]:
    at = targets[:, None]
    return {
        "nll": -logits.gather(1, at).mean().item(),
        "full_nll": -full.gather(1, at).mean().item(),
        "kl": (full.exp() * (full - logits)).sum(-1).mean().item(),
        "top1": (full.argmax(-1) == logits.argmax(-1)).float().mean().item(),
        "found": logits.argmax(-1).equal(targets),
    }


def _costs(model: CacheModel, sample: Sample) -> dict[str, Any]:
    """Time each method's selection from all layers at 4 times fewer tokens, in seconds of a second run."""
    read = model.read(sample.tokens[: sample.end], [sample.end - 1])
    costs = {}
    for variant in VARIANTS:
        if variant.ratio != 4 or variant.format != "bf16" or variant.newest:
            continue
        for _ in range(2):
            seen, scorers = read.observed(sample.end, WINDOW), {}
            began = time.perf_counter()
            chosen = named(variant, scorers, 0)
            for observed in seen:
                keep(chosen, observed, sample.end // 4)
            costs[str(variant)] = time.perf_counter() - began
    return {"costs": costs}


if __name__ == "__main__":
    main()

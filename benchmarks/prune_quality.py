"""What pruning costs in quality: masks, sparsities and calibrations, on language models and image classifiers.

Every row is one pipeline from the dense model. A language model is scored by perplexity on held-out text, and
calibrated on the source of Python's library; what image classifiers are scored and calibrated on is said in
`prune_images.py`. What is done is kept in the file of `--json`.

    python benchmarks/prune_quality.py --model FOLDER --text FILE --json prune.json
    python benchmarks/prune_quality.py --classifier efficientnet-lite0 --json prune.json          # needs specqd[bench]
    python benchmarks/prune_quality.py --classifier efficientnet-lite0 --dataset FOLDER_OF_IMAGENET_PICTURES
    python benchmarks/prune_quality.py --classifier tests/data/resnet18-fashion-mnist --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import report
import torch
from prune_cases import Case, of_images, of_language
from prune_images import EFFICIENTNET, classifier, dataset_option, named
from prune_models import Subject, language, layer_errors, peak_mb
from prune_plot import plot
from prune_tables import Row, cost, quality

from specqd.passes import Pipeline
from specqd.program import Program
from specqd.verified import cache_directory


def main() -> None:
    """Measure what is not yet known, print, and write what `report` writes."""
    options = _options()
    torch.set_num_threads(options.threads)
    name = named(options.classifier, options.dataset) if options.classifier else options.model.name
    rows = report.Kept(options, _key)
    cases = list((of_images if options.classifier else of_language)(options.sparsities, options.seeds))
    known = {key[:-1] for key in rows}
    missing = [
        case
        for case in cases
        if (name, *_facts(case).values()) not in known and re.search(options.only, str(case))
    ]
    if missing:
        subject = _subject(options)
        dense = subject.scores(subject.program)
        for case in missing:
            if rows.late:
                break
            for row in _measure(case, name, subject, dense, options):
                rows.add(row)
    mine = [row for row in rows.values() if row["model"] == name]
    metric, what = ("top-1", "drop") if options.classifier else ("perplexity", "value")
    tables = [quality(mine, metric, what), cost(mine, metric)]
    if options.classifier:
        tables.insert(1, quality(mine, "agreement", what))
    tables = [table for table in tables if table.rows]
    details = {"model": name, "calibration samples": options.samples, "threads": options.threads}
    details["devices"] = sorted({row["device"] for row in mine})
    report.write(f"prune_quality-{name}", tables, details, mine, options, list(rows.values()))
    if mine:
        plot(mine, metric, options.output / f"prune_quality-{name}.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what pruning costs in quality.")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a language model")
    parser.add_argument("--text", type=Path, help="held-out text that it is scored on")
    parser.add_argument(
        "--classifier",
        type=Path,
        help=f"{EFFICIENTNET}, or a folder of train_resnet.py, instead of a language model",
    )
    dataset_option(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text that are scored")
    parser.add_argument("--window", type=int, default=512, help="tokens that are scored together")
    parser.add_argument("--images", type=int, default=10_000, help="that classifiers are scored on")
    parser.add_argument("--samples", type=int, help="to calibrate on: 32 texts of 512 tokens, or 300 images")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9])
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="choices of the calibration data"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="of cases as prune_cases.py writes them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device", default="cpu", help="where classifiers are pruned, calibrated and scored, such as cuda"
    )
    report.add_limit(parser)
    parser.add_argument(
        "--quick", action="store_true", help="one sparsity and seed, fewer samples, tokens, images"
    )
    report.add_options(parser)
    options = parser.parse_args()
    if not options.classifier and not (options.model and options.text):
        parser.error("give --model FOLDER and --text FILE, or --classifier")
    options.samples = options.samples or (300 if options.classifier else 32)
    if options.quick:
        options.sparsities, options.seeds, options.samples = [0.5], [0], min(options.samples, 8)
        options.tokens, options.images = 1024, min(options.images, 200)
    return options


def _subject(options: argparse.Namespace) -> Subject:
    made = cache_directory() / "benchmarks" / "prune"
    if not options.classifier:
        return language(options.model, options.text.read_text("utf-8"), made, options.tokens, options.window)
    return classifier(options.classifier, options.dataset, made, options.images, options.device)


def _measure(
    case: Case, name: str, subject: Subject, dense: dict[str, float], options: argparse.Namespace
) -> Iterator[Row]:
    device = machine.facts()["cpu"] if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    source = f"samples={options.samples},seed={case.seed}"
    source += f",data={subject.data[case.data]}" if case.data != "none" else ""
    source += ",pixels=signed" if options.classifier else ""
    rounding = f"quantize-int8{{{source}}}" if options.classifier else f"cast-{case.precision}"
    # A cache of its own, in which nothing is solved already.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, SPECQD_CACHE=folder):
        _reset_peak()
        began = time.perf_counter()
        program = (
            Pipeline.parse(case.pruning(source))(subject.program)
            if case.method != "dense"
            else subject.program
        )
        seconds, peak = time.perf_counter() - began, peak_mb()
    errors, zeros = layer_errors(subject, program), _zeros(program)
    if case.precision != "float":
        program = Pipeline.parse(rounding)(program)
    for metric, value in subject.scores(program).items():
        drop = dense[metric] - value if metric in subject.larger_is_better else value - dense[metric]
        yield {
            "model": name, **_facts(case), "metric": metric, "dense": round(dense[metric], 4), "value": round(value, 4),
            "drop": round(drop, 4), "layer_mse": round(statistics.fmean(errors), 6) if errors else 0.0,
            "reached": round(zeros, 4), "seconds": round(seconds, 2), "peak_mb": round(peak), "device": device,
        }  # fmt: skip


def _facts(case: Case) -> Row:
    return dataclasses.asdict(case)


def _key(row: Row) -> tuple[Any, ...]:
    return (row["model"], *(row[field] for field in _facts(Case("", 0.0))), row["metric"])


def _zeros(pruned: Program) -> float:
    """Share of zeros in the matrices and kernels that pruning changed."""
    changed = [w for name, w in pruned.weights.items() if name in pruned.dense and w.dim() > 1]
    total = sum(w.numel() for w in changed)
    return sum(int((w == 0).sum()) for w in changed) / total if total else 0.0


def _reset_peak() -> None:
    """Let the kernel count the process's highest memory from now on (Linux, `man 5 proc`)."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()

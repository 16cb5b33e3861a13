"""What pruning costs in quality: methods, sparsities and calibration, on a language model or EfficientNet-Lite0.

Every row is one pipeline from the dense model. A language model is scored by perplexity on held-out text, and
calibrated on the source of Python's library; EfficientNet-Lite0 by agreement and divergence with itself before
pruning, on crops of photos that scikit-image and scikit-learn ship, of which others calibrate. What is done is kept
in the file of `--json`.

    python benchmarks/prune_quality.py --model FOLDER --text FILE --json prune.json
    python benchmarks/prune_quality.py --vision --json prune.json        # needs specqd[bench]
    python benchmarks/prune_quality.py --model FOLDER --text FILE --quick
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import report
import torch
from prune_models import Subject, language, layer_errors, vision

from specqd.passes import Pipeline
from specqd.program import Program
from specqd.verified import cache_directory

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One pipeline. `pattern` is of `sparsify`; `data` a name that the subject knows, or none."""

    method: str
    sparsity: float
    data: str = "none"
    calibration: str = "none"
    precision: str = "float"
    pattern: str = "any"
    seed: int = 0

    def pipeline(self, subject: Subject, samples: int, more: str) -> str:
        """Say how to prune and calibrate; `more` options of what reads data."""
        source = ""
        if self.data != "none":
            source = f",data={subject.data[self.data]},samples={samples},seed={self.seed}{more}"
        share = f"pattern={self.pattern}" if self.pattern != "any" else f"sparsity={self.sparsity}"
        allocation = "" if self.pattern != "any" or self.method == "global" else ",allocation=uniform"
        method = "magnitude" if self.method == "global" else self.method
        of_masks = source if self.method in ("wanda", "sparsegpt") else ""
        pruning = f"sparsify{{{share},method={method}{allocation}{of_masks}}}"
        if self.calibration == "none":
            return pruning
        return f"{pruning}, calibrate{{method={self.calibration}{source}}}"


def main() -> None:
    """Measure what is not yet known, print, and write what `report` writes."""
    options = _options()
    torch.set_num_threads(options.threads)
    name = "EfficientNet-Lite0" if options.vision else options.model.name
    rows = report.Kept(options, _key)
    cases = list((_of_vision if options.vision else _of_language)(options))
    missing = [case for case in cases if (name, *_facts(case).values()) not in {key[:-1] for key in rows}]
    if missing:
        subject = _subject(options)
        dense = subject.scores(subject.program)
        for case in missing:
            if rows.late:
                break
            for row in _measure(case, name, subject, dense, options):
                rows.add(row)
    mine = [row for row in rows.values() if row["model"] == name]
    details = {"model": name, "calibration samples": options.samples, "threads": options.threads}
    report.write(f"prune_quality-{name}", [_table(mine)], details, mine, options, list(rows.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what pruning costs in quality.")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a language model")
    parser.add_argument("--text", type=Path, help="held-out text that it is scored on")
    parser.add_argument("--vision", action="store_true", help="EfficientNet-Lite0 instead")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text that are scored")
    parser.add_argument("--window", type=int, default=512, help="tokens that are scored together")
    parser.add_argument(
        "--samples", type=int, default=32, help="texts of 512 tokens, or images, to calibrate on"
    )
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.4, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--seeds", type=int, default=1, help="how many choices of the calibration data")
    parser.add_argument("--threads", type=int, default=2)
    report.add_limit(parser)
    parser.add_argument("--quick", action="store_true", help="one sparsity, fewer samples and tokens")
    report.add_options(parser)
    options = parser.parse_args()
    if not options.vision and not (options.model and options.text):
        parser.error("give --model FOLDER and --text FILE, or --vision")
    if options.quick:
        options.sparsities, options.samples, options.tokens = [0.5], min(options.samples, 8), 1024
    return options


def _of_language(options: argparse.Namespace) -> Iterator[Case]:
    for seed in range(options.seeds):
        for share in options.sparsities:
            if seed == 0:
                yield Case("magnitude", share)
            yield Case("wanda", share, "text", seed=seed)
            yield Case("sparsegpt", share, "text", seed=seed)
            yield Case("magnitude", share, "text", "closed", seed=seed)
            yield Case("wanda", share, "text", "closed", seed=seed)
    for precision in ("int8", "mxfp4"):
        yield Case("magnitude", 0.0, precision=precision)
        yield Case("sparsegpt", 0.5, "text", precision=precision)
    yield Case("sparsegpt", 0.5, "text", pattern="2:4")


def _of_vision(options: argparse.Namespace) -> Iterator[Case]:
    for seed in range(options.seeds):
        for share in options.sparsities:
            if seed == 0:
                yield Case("global", share)
            for data in ("fractals", "photos"):
                for how in ("correct", "closed", "adam"):
                    yield Case("global", share, data, how, seed=seed)


def _subject(options: argparse.Namespace) -> Subject:
    made = cache_directory() / "benchmarks" / "prune"
    if options.vision:
        return vision(made, 16)
    return language(options.model, options.text.read_text("utf-8"), made, options.tokens, options.window)


def _measure(
    case: Case, name: str, subject: Subject, dense: dict[str, float], options: argparse.Namespace
) -> Iterator[Row]:
    pruning = case.pipeline(subject, options.samples, ",pixels=signed" if options.vision else "")
    # A cache of its own, in which nothing is solved already.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, SPECQD_CACHE=folder):
        _reset_peak()
        began = time.perf_counter()
        program = Pipeline.parse(pruning)(subject.program)
        seconds, peak = time.perf_counter() - began, _peak_mb()
    errors, zeros = layer_errors(subject, program), _zeros(program)
    if case.precision != "float":
        program = Pipeline.parse(f"cast-{case.precision}")(program)
    for metric, value in subject.scores(program).items():
        drop = dense[metric] - value if metric in subject.larger_is_better else value - dense[metric]
        yield {
            "model": name, **_facts(case), "metric": metric, "dense": round(dense[metric], 4), "value": round(value, 4),
            "drop": round(drop, 4), "layer_mse": round(statistics.fmean(errors), 6) if errors else 0.0,
            "reached": round(zeros, 4), "seconds": round(seconds, 1), "peak_mb": round(peak),
        }  # fmt: skip


def _facts(case: Case) -> Row:
    fields = ("method", "pattern", "sparsity", "precision", "data", "calibration", "seed")
    return {field: getattr(case, field) for field in fields}


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


def _peak_mb() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1e3


def _table(rows: Sequence[Row]) -> report.Table:
    headings = ["method", "zeros", "precision", "data", "calibration", "metric", "dense", "value", "drop",
                "layer error", "s", "peak MB"]  # fmt: skip
    lines = [
        [
            r["method"], f"{r['reached']:.0%}" + (f" {r['pattern']}" if r["pattern"] != "any" else ""), r["precision"],
            r["data"], r["calibration"], r["metric"], f"{r['dense']:.3f}", f"{r['value']:.3f}", f"{r['drop']:.3f}",
            f"{r['layer_mse']:.4f}", f"{r['seconds']:.0f}", f"{r['peak_mb']:.0f}",
        ]
        for r in rows
    ]  # fmt: skip
    figures = {" ".join(map(str, _key(r)[1:])): r["value"] for r in rows}
    return report.Table("After pruning:", headings, lines, figures)


if __name__ == "__main__":
    main()

"""What tuning gains: whole models with schedules that were measured, in turns with the usual ones.

python benchmarks/tuning.py --models ResNet-50 ViT-S/16 --minutes 3
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import machine
import report
from model_engines import PRECISIONS, in_precision
from model_zoo import MODELS, build

import specqd
from specqd.build import compile_model
from specqd.tuning import Tuning

_SECONDS, _PAUSE = 0.3, 0.1  # of a measurement, and before it


def main() -> None:
    """Tune, measure, print, and write what `report` writes."""
    options = _options()
    quiet, rows = machine.Quiet(set()), []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            for precision in options.precisions:
                place = Path(scratch) / f"{model.replace('/', '-')}-{precision}"
                tuned = _compiled(model, precision, place, options)
                row = quiet(partial(_measure, model, place, options))
                rows.append({"model": model, "precision": precision, "kernels": tuned, **row})
                print(rows[-1], flush=True)
    gain = geometric_mean(row["speedup"] for row in rows)
    lines = [
        [
            f"{row['model']} {row['precision']}",
            f"{row['usual_ms']:.2f}",
            f"{row['tuned_ms']:.2f}",
            f"{row['speedup']:.2f}",
            str(row["kernels"]),
        ]
        for row in rows
    ]
    table = report.Table(
        f"Tuned for {options.minutes:g} minutes each; geometric mean {gain:.3f} times as fast:",
        ["model", "usual ms", "tuned ms", "times as fast", "kernels cut otherwise"],
        lines,
    )
    details = {
        "model": "tuned models",
        "rounds": options.rounds,
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write("tuning", [table], details, rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what tuning gains.")
    parser.add_argument("--models", nargs="+", default=["ResNet-50", "ViT-S/16"], choices=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=PRECISIONS)
    parser.add_argument("--minutes", type=float, default=3.0, help="to tune each")
    parser.add_argument("--database", type=Path, help="of what is measured (default: none is kept)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="UNet, half a minute")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.models, options.minutes, options.rounds = ["UNet"], 0.5, 3
    return options


def _compiled(model: str, precision: str, place: Path, options: argparse.Namespace) -> int:
    """Compile both ways; return how many kernels have another schedule."""
    module, x = build(model)
    program, _ = in_precision(model, module, x, precision)
    compile_model(program, place / "usual", pipeline="")
    tuning = Tuning(options.minutes, database=options.database or place / "measured.jsonl")
    made = compile_model(program, place / "tuned", pipeline="", tuning=tuning)
    assert made.module is not None
    return len(made.module.tuned)


def _measure(model: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    _, x = build(model)
    runs = {name: _timed(specqd.load(place / name), x) for name in ("usual", "tuned")}
    taken = machine.in_turns(runs, options.rounds, _SECONDS, _PAUSE)
    usual, tuned = (report.spread(taken[name]).median for name in ("usual", "tuned"))
    ratio = report.spread(a / b for a, b in zip(taken["usual"], taken["tuned"], strict=True))
    return {
        "usual_ms": round(usual * 1e3, 3),
        "tuned_ms": round(tuned * 1e3, 3),
        "speedup": round(ratio.median, 3),
    }


def _timed(run: Any, x: Any) -> Callable[[int], float]:
    def seconds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            run(x)
        return (time.perf_counter() - began) / count

    return seconds


if __name__ == "__main__":
    main()

"""Whole models at batch 1, in float32, BF16 and INT8, in turns with eager torch, inductor, onnxruntime and OpenVINO.

Each engine works in a process that is idle while the others run; peers that are not installed are left out, and one
that fails ends the run. All have the same random weights; INT8 peers read the pairs of QuantizeLinear and
DequantizeLinear that quantize-int8 made. `float32-direct` is ours without Winograd's algorithm: BF16 and INT8 do
the same arithmetic. The share of the peak is that of what the CPU reaches in float32 by multiplications and additions
in registers; with Winograd's algorithm it is of the arithmetic that direct sums would take, and may be above 1.

    python benchmarks/models.py                                   # all models
    python benchmarks/models.py --quick --models ResNet-34 --json models.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import machine
import model_engines
import report
from model_engines import ENGINES, PRECISIONS
from model_zoo import MODELS
from peers.client import Peer

from specqd.peaks import measure_peaks

_SECONDS = 0.3  # of a measurement
_PAUSE = 0.1  # for the other engines' threads to stop spinning
_BEST = ("onnxruntime", "openvino")
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = read_options("Measure whole models against other engines.", list(MODELS), ["ResNet-18", "UNet"])
    rows, details = measured(options)
    report.write("models", [_table(rows), _means(rows)], {"model": "whole models", **details}, rows, options)


def measured(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Return a row for each model and precision, and how it was measured."""
    os.environ |= {"TVM_NUM_THREADS": str(options.threads), "TVM_BIND_THREADS": "0"}
    rows: list[Row] = []
    # Before there are others, which take a while to start.
    fastest = measure_peaks("native", options.threads).gflops
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        peers = {
            name: stack.enter_context(
                Peer(Path(sys.executable), "../model_engines", name, str(options.threads))
            )
            for name in ("specqd", *options.engines)
            if all(map(find_spec, ENGINES[name].packages))
        }
        quiet = machine.Quiet({peer.pid for peer in peers.values()})
        quiet.WAIT, quiet.TRIES = 2.0, 1
        for model in options.models:
            folder = (options.keep or Path(scratch)) / model.replace("/", "-")
            facts = _prepared(model, folder, options)
            for row in quiet(lambda m=model, f=folder, k=facts: _measure(m, f, k, peers, fastest, options)):  # type: ignore[misc]
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    details = {
        "rounds": options.rounds,
        "threads": options.threads,
        "FP32 peak, GFLOP/s": round(fastest),
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    return rows, details


def read_options(description: str, models: list[str], few: list[str]) -> argparse.Namespace:
    """Read the options of a benchmark of these models, of which `--quick` takes a few."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    others = [name for name in ENGINES if name != "specqd"]
    parser.add_argument("--engines", nargs="+", default=others, choices=others, help="the peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for what is compiled, to use it again")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(few)}, two rounds")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
        options.models = few if options.models == models else options.models
    return options


def _prepared(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the facts of a model after compiling the precisions that its folder does not hold yet."""
    known = folder / "facts.json"
    facts: dict[str, Any] = json.loads(known.read_text()) if known.is_file() else {}
    missing = [precision for precision in options.precisions if precision not in facts]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, model_engines.__file__, "prepare", model, str(folder), *missing]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        facts |= json.loads(found.stdout.splitlines()[-1])
        known.write_text(json.dumps(facts))
    return facts


def _measure(
    model: str, folder: Path, facts: dict[str, Any], peers: dict[str, Peer], fastest: float, options: Any
) -> list[Row]:
    runs: dict[tuple[str, str], Callable[[int], float]] = {}
    for precision in options.precisions:
        asked = {"model": model, "folder": str(folder), "precision": precision}
        for name, peer in peers.items():
            if precision in ENGINES[name].precisions:
                runs[name, precision] = partial(peer.seconds, **asked)
    taken = machine.in_turns(runs, options.rounds, _SECONDS, _PAUSE)
    rows = []
    for precision in options.precisions:
        of = {name: median(times) for (name, kind), times in taken.items() if kind == precision}
        row = {"model": model, "precision": precision}
        row |= {f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in of.items()}
        row["peak_fraction"] = round(facts["flops"] / of["specqd"] / 1e9 / fastest, 3)
        rows.append(row | facts[precision])
    return rows


def _table(rows: Sequence[Row]) -> report.Table:
    keys = ["specqd_ms", "eager_ms", "inductor_ms", "onnxruntime_ms", "openvino_ms"]
    lines = [
        [
            f"{row['model']} {row['precision']}",
            *(f"{row[key]:.2f}" if key in row else "" for key in keys),
            f"{row['peak_fraction']:.2f}",
            f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    headings = ["model", "specqd ms", "eager ms", "inductor ms", "onnxruntime ms", "OpenVINO ms"]
    return report.Table("Models:", [*headings, "of FP32 peak", "off float32 by"], lines)


def _means(rows: Sequence[Row]) -> report.Table:
    """Geometric means over the models of how much longer others take, and our own float32."""
    ours = {(row["model"], row["precision"]): row["specqd_ms"] for row in rows}
    lines, figures = [], {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        chosen = [row for row in rows if row["precision"] == precision]
        cells = [precision]
        for name in ("float32", "float32-direct", "eager", "inductor", *_BEST, "best"):
            others = [
                ours.get((row["model"], name)) if name in PRECISIONS else _taken(row, name) for row in chosen
            ]
            ratios = [other / row["specqd_ms"] for row, other in zip(chosen, others, strict=True) if other]
            figures[f"{name} / {precision}"] = geometric_mean(ratios) if ratios else None
            cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "")
        lines.append(cells)
    headings = [
        "times as long",
        "our float32",
        "by direct sums",
        "eager",
        "inductor",
        "onnxruntime",
        "OpenVINO",
        "faster of these two",
    ]
    return report.Table("Geometric means:", headings, lines, figures)


def _taken(row: Row, name: str) -> float | None:
    """Return the milliseconds of a peer; `best`: of the faster of two."""
    if name != "best":
        return row.get(f"{name}_ms")
    return min((row[f"{one}_ms"] for one in _BEST if f"{one}_ms" in row), default=None)


if __name__ == "__main__":
    main()

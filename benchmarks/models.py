"""Whole models at batch 1, in float32, BF16 and INT8, in turns with eager torch, inductor, onnxruntime and OpenVINO.

Each engine works in a process that is idle while the others run; peers that are not installed are left out. All have
the same random weights; INT8 peers read the pairs of QuantizeLinear and DequantizeLinear that quantize-int8 made. The
share of the peak is that of what the CPU reaches in float32 by multiplications and additions in registers.

    python benchmarks/models.py                                   # all models
    python benchmarks/models.py --quick --models ResNet-34 --json models.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import machine
import report
from model_zoo import MODELS

from specqd.peaks import measure_peaks

_SECONDS = 0.3  # of a measurement
_PAUSE = 0.1  # for the other engines' threads to stop spinning
_WORKER = Path(__file__).with_name("model_engines.py")
_PEERS = ("onnxruntime", "openvino")
Row = dict[str, Any]
Ask = Callable[..., "tuple[float | None, str]"]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    os.environ |= {"TVM_NUM_THREADS": str(options.threads), "TVM_BIND_THREADS": "0"}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        names = ["specqd", "eager", "inductor", *(name for name in _PEERS if importlib.util.find_spec(name))]
        names = [name for name in names if name == "specqd" or name in options.engines]
        started = {name: stack.enter_context(_engine(name, options.threads)) for name in names}
        engines = {name: ask for name, (ask, _) in started.items()}
        quiet = machine.Quiet([pid for _, pid in started.values()])
        quiet.WAIT, quiet.TRIES = 2.0, 1
        fastest = measure_peaks("native", options.threads).gflops
        for model in options.models:
            folder = (options.keep or Path(scratch)) / model.replace("/", "-")
            facts = _prepared(model, folder, options)
            for row in quiet(lambda m=model, f=folder, k=facts: _measure(m, f, k, engines, fastest, options)):  # type: ignore[misc]
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    details = {
        "model": "whole models",
        "rounds": options.rounds,
        "threads": options.threads,
        "FP32 peak, GFLOP/s": round(fastest),
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write("models", [_table(rows), _means(rows)], details, rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure whole models against other engines.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16", "int8"])
    parser.add_argument("--engines", nargs="+", default=["eager", "inductor", *_PEERS], help="the peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for what is compiled, to use it again")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and UNet, two rounds")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
        options.models = ["ResNet-18", "UNet"] if options.models == list(MODELS) else options.models
    return options


def _prepared(model: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    known = folder / "facts.json"
    if not known.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(_WORKER), "prepare", model, str(folder), *options.precisions]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        known.write_text(found.stdout.splitlines()[-1])
    return json.loads(known.read_text())


@contextmanager
def _engine(name: str, threads: int) -> Iterator[tuple[Ask, int]]:
    """Start an engine's process; gives what asks it for seconds, and its number."""
    command = [sys.executable, str(_WORKER), name, str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asking, answers = process.stdin, process.stdout
        assert asking is not None
        assert answers is not None
        answers.readline()

        def ask(**asked: Any) -> tuple[float | None, str]:
            print(json.dumps(asked), file=asking, flush=True)
            for line in answers:
                if line.startswith("["):
                    return tuple(json.loads(line))
            raise SystemExit(f"the process of {name} ended")

        yield ask, process.pid
        asking.close()


def _measure(
    model: str, folder: Path, facts: dict[str, Any], engines: dict[str, Ask], fastest: float, options: Any
) -> list[Row]:
    runs: dict[tuple[str, str], Callable[[int], float]] = {}
    repeats: dict[tuple[str, str], int] = {}
    for precision in options.precisions:
        for name, ask in engines.items():

            def run(count: int, ask: Ask = ask, precision: str = precision) -> float:
                return ask(model=model, folder=str(folder), precision=precision, repeats=count)[0] or math.nan

            first, why = ask(model=model, folder=str(folder), precision=precision, repeats=3)
            if first is None:
                print(f"{model} {precision}: {name} is left out: {why}", file=sys.stderr)
                continue
            runs[name, precision], repeats[name, precision] = run, max(3, math.ceil(_SECONDS / first))
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order = list(runs)
    for number in range(options.rounds):
        for key in order[number % len(order) :] + order[: number % len(order)]:
            time.sleep(_PAUSE)
            taken[key].append(runs[key](repeats[key]))
    rows = []
    for precision in options.precisions:
        of = {name: median(times) for (name, kind), times in taken.items() if kind == precision}
        row = {"model": model, "precision": precision}
        row |= {f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in of.items()}
        if "specqd" in of:
            row["peak_fraction"] = round(facts["flops"] / of["specqd"] / 1e9 / fastest, 3)
        rows.append(row | facts[precision])
    return rows


def _table(rows: Sequence[Row]) -> report.Table:
    keys = ["specqd_ms", "eager_ms", "inductor_ms", "onnxruntime_ms", "openvino_ms"]
    lines = [
        [
            f"{row['model']} {row['precision']}",
            *(f"{row[key]:.2f}" if key in row else "" for key in keys),
            f"{row.get('peak_fraction', math.nan):.2f}",
            f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    headings = ["model", "specqd ms", "eager ms", "inductor ms", "onnxruntime ms", "OpenVINO ms"]
    return report.Table("Models:", [*headings, "of FP32 peak", "off float32 by"], lines)


def _means(rows: Sequence[Row]) -> report.Table:
    """Geometric means over the models of how much longer others take, and our own float32."""
    ours = {(row["model"], row["precision"]): row.get("specqd_ms") for row in rows}
    lines, figures = [], {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        chosen = [row for row in rows if row["precision"] == precision and "specqd_ms" in row]
        cells = [precision]
        for name in ("float32", "eager", "inductor", "onnxruntime", "openvino"):
            others = [
                ours.get((r["model"], name)) if name == "float32" else r.get(f"{name}_ms") for r in chosen
            ]
            ratios = [other / row["specqd_ms"] for row, other in zip(chosen, others, strict=True) if other]
            figures[f"{name} / {precision}"] = geometric_mean(ratios) if ratios else None
            cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "")
        lines.append(cells)
    headings = ["times as long", "our float32", "eager", "inductor", "onnxruntime", "OpenVINO"]
    return report.Table("Geometric means:", headings, lines, figures)


if __name__ == "__main__":
    main()

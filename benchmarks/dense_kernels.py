"""Convolution and matrix kernels, layer by layer, in turns with torch and onnxruntime.

Each engine works in a process that is idle while the others run, on its own layout of activations: ours are
in blocks, as a chain of convolutions keeps them; the peers take NCHW and convert what they like, so there is
a column of ours from NCHW and back as well. FP32 is compared with both peers, BF16 with torch, INT8 (u8 x s8,
requantised to u8) with our FP32.

    python benchmarks/dense_kernels.py                          # all layers
    python benchmarks/dense_kernels.py --quick --models ResNet-50 --json dense.json
    python benchmarks/dense_kernels.py --onnxruntime PYTHON     # an interpreter that has onnxruntime and onnx
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import machine
import report
from dense_layers import LAYERS, Layer
from dense_subject import PRECISIONS, kernel
from peers.client import Peer

from specqd.codegen.isa import ISA
from specqd.peaks import measure_peaks

_SECONDS = 0.03  # of a measurement
_WAIT = 2.0  # at most, for other processes to finish
_PAUSE = 0.05  # for the other engines' threads to stop spinning
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    isa = machine.instruction_set(options.isa, options.threads)
    layers = [layer for layer in LAYERS if layer.model in options.models]
    if options.quick:
        layers = layers[:: max(1, len(layers) // 8)]
    rows: list[Row] = []
    with ExitStack() as stack:
        peers = {
            name: stack.enter_context(Peer(python, "../dense_peers", name, str(options.threads)))
            for name, python in _peers(options)
        }
        quiet = machine.Quiet({peer.pid for peer in peers.values()})
        quiet.WAIT, quiet.TRIES = _WAIT, 2
        fastest = measure_peaks(isa.name, options.threads).gflops
        for layer in layers:
            measured = quiet(lambda layer=layer: _measure(layer, isa, peers, fastest, options))  # type: ignore[misc]
            rows += measured
            for row in measured:
                print(json.dumps(row), file=sys.stderr, flush=True)
    details = {
        "model": "dense kernels",
        "rounds": options.rounds,
        "threads": options.threads,
        "isa": isa.name,
        "FP32 peak, GFLOP/s": round(fastest),
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write("dense-kernels", [_layers(rows), _models(rows)], details, rows, options)


def _options() -> argparse.Namespace:
    models = list(dict.fromkeys(layer.model for layer in LAYERS))
    parser = argparse.ArgumentParser(description="Measure convolution and matrix kernels layer by layer.")
    parser.add_argument("--models", nargs="+", default=models, choices=models, help="whose layers")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--isa", default="native", help="instruction set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--onnxruntime", type=Path, help="python with onnxruntime and onnx (default: this one)"
    )
    parser.add_argument("--quick", action="store_true", help="some eight layers, two rounds")
    report.add_options(parser)
    options = parser.parse_args()
    options.rounds = 2 if options.quick else options.rounds
    return options


def _peers(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    yield "torch", Path(sys.executable)
    if options.onnxruntime or importlib.util.find_spec("onnxruntime"):
        yield "onnxruntime", options.onnxruntime or Path(sys.executable)


def _measure(
    layer: Layer,
    isa: ISA,
    peers: dict[str, Peer],
    fastest: float,
    options: argparse.Namespace,
) -> list[Row]:
    engines: dict[tuple[str, str], Callable[[int], float]] = {}
    flops = 0
    for precision in options.precisions:
        spec, call = kernel(layer, PRECISIONS[precision], isa)
        flops = spec.flops
        engines["specqd", precision] = call
        if precision == "float32" and layer.kernel:
            engines["converted", precision] = kernel(layer, "float32", isa, converted=True)[1]
        for name, peer in peers.items():
            if precision == "float32" or (name, precision) == ("torch", "bfloat16"):
                asked = {**asdict(layer), "dtype": precision, "threads": options.threads}
                engines[name, precision] = partial(peer.seconds, layer=asked)
    taken = machine.in_turns(engines, options.rounds, _SECONDS, _PAUSE)
    rows = []
    for precision in options.precisions:
        of = {name: median(times) for (name, kind), times in taken.items() if kind == precision}
        ours = of["specqd"]
        row = {
            "model": layer.model,
            "layer": layer.name,
            "count": layer.count,
            "precision": precision,
            "us": round(ours * 1e6, 1),
            "gflops": round(flops / ours / 1e9, 1),
            "peak_fraction": round(flops / ours / 1e9 / fastest, 3),
            **{f"{name}_us": round(of[name] * 1e6, 1) for name in [*peers, "converted"] if name in of},
        }
        if precision != "float32" and ("specqd", "float32") in taken:
            row["float32_us"] = round(median(taken["specqd", "float32"]) * 1e6, 1)
        rows.append(row)
    return rows


def _layers(rows: Sequence[Row]) -> report.Table:
    headings = [
        "layer",
        "precision",
        "us",
        "GFLOP/s",
        "of FP32 peak",
        "from NCHW us",
        "torch us",
        "onnxruntime us",
    ]
    lines = [
        [
            f"{r['model']} {r['layer']}",
            r["precision"],
            f"{r['us']:.0f}",
            f"{r['gflops']:.0f}",
            f"{r['peak_fraction']:.2f}",
            *(f"{r[key]:.0f}" if key in r else "" for key in ("converted_us", "torch_us", "onnxruntime_us")),
        ]
        for r in rows
    ]
    return report.Table("Layers:", headings, lines)


def _models(rows: Sequence[Row]) -> report.Table:
    """Sums over the layers of each model, as often as they occur, and geometric means of ratios."""
    lines, figures = [], {}
    for model, precision in dict.fromkeys((r["model"], r["precision"]) for r in rows):
        chosen = [r for r in rows if (r["model"], r["precision"]) == (model, precision)]
        total = sum(r["us"] * r["count"] for r in chosen)
        cells = [f"{model} {precision}", f"{total / 1e3:.2f}"]
        for key in ("torch_us", "onnxruntime_us", "float32_us"):
            if key not in chosen[0]:
                cells += ["", ""]
                continue
            ratio = sum(r[key] * r["count"] for r in chosen) / total
            mean = geometric_mean([r[key] / r["us"] for r in chosen])
            cells += [f"{ratio:.2f}", f"{mean:.2f}"]
            figures[f"{model} {precision} {key[:-3]}"] = {"sum": ratio, "geometric mean": mean}
        lines.append(cells)
    headings = ["sum of layers", "ms"]
    for other in ("torch", "onnxruntime", "our FP32"):
        headings += [f"{other} / ours", "geometric mean"]
    return report.Table("Models:", headings, lines, figures)


if __name__ == "__main__":
    main()

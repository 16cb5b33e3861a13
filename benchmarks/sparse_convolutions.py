"""What sparsity could save in the INT8 convolutions of ResNet-50: two bounds, from the dense kernels themselves.

`bytes`: the time with weights that come from beyond the cores' own caches, to that with weights that are near: all that
storing fewer bytes can save. `products`: the same to the time of a layer of as many inputs as weights are left: what
skipping each product with a zero would save if finding them cost nothing. An instruction multiplies 4 neighbouring
inputs (VNNI) or 64 (AMX) of 16 outputs at once; `skipped` says how many of the former meet zeros only, when zeros lie
at random.

    python benchmarks/sparse_convolutions.py
    python benchmarks/sparse_convolutions.py --sparsity 0.8 --quick --json bound.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import machine
import report
from dense_layers import LAYERS, Layer
from dense_subject import kernel

from specqd.codegen.isa import ISA

_SECONDS = 0.02  # of a measurement
_APART = 64_000_000  # bytes of weights between two uses of the same: more than the cores' own caches hold
_AT_ONCE = 16 * 4  # weights that one instruction multiplies at least
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    isa = machine.instruction_set(options.isa, options.threads)
    layers = [layer for layer in LAYERS if layer.model == "ResNet-50" and layer.inputs > 3]
    quiet = machine.Quiet()
    quiet.WAIT, quiet.TRIES = 1.0, 1
    rows = [
        quiet(lambda layer=layer: _measure(layer, isa, options))  # type: ignore[misc]
        for layer in (layers[::4] if options.quick else layers)
    ]
    details = {
        "model": "sparse convolutions",
        "sparsity": options.sparsity,
        "threads": options.threads,
        "isa": isa.name,
        "skipped": f"{options.sparsity**_AT_ONCE:.1g} of the instructions",
        "cores used by other processes, at most": round(quiet.worst, 2),
    }
    report.write("sparse-convolutions", [_table(rows)], details, rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bound what sparsity can save in INT8 convolutions.")
    parser.add_argument("--sparsity", type=float, default=0.65, help="share of zeros")
    parser.add_argument("--isa", default="native", help="instruction set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="every fourth layer, three rounds")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 3
    return options


def _measure(layer: Layer, isa: ISA, options: argparse.Namespace) -> Row:
    left = max(1, round(layer.inputs * (1 - options.sparsity)))
    size = layer.inputs * layer.outputs * layer.kernel**2
    runs: dict[str, Callable[[int], float]] = {
        "far": kernel(layer, "uint8", isa, weights=-(-_APART // size))[1],
        "near": kernel(layer, "uint8", isa)[1],
        "fewer": kernel(replace(layer, inputs=left), "uint8", isa, weights=-(-_APART // size))[1],
    }
    taken = machine.in_turns(runs, options.rounds, _SECONDS)
    seconds = {name: median(times) for name, times in taken.items()}
    return {
        "layer": layer.name,
        "count": layer.count,
        "weights_kb": round(size / 1e3),
        **{f"{name}_us": round(seconds[name] * 1e6, 1) for name in runs},
        "bytes": round(seconds["far"] / seconds["near"], 3),
        "products": round(seconds["far"] / seconds["fewer"], 3),
    }


def _table(rows: Sequence[Row]) -> report.Table:
    total = {name: sum(row[f"{name}_us"] * row["count"] for row in rows) for name in ("far", "near", "fewer")}
    lines = [
        [
            r["layer"], str(r["count"]), str(r["weights_kb"]), f"{r['far_us']:.1f}", f"{r['near_us']:.1f}",
            f"{r['fewer_us']:.1f}", f"{r['bytes']:.2f}", f"{r['products']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    whole = {"bytes": total["far"] / total["near"], "products": total["far"] / total["fewer"]}
    lines.append(
        [
            "all",
            "",
            "",
            *(f"{of / 1e3:.2f} ms" for of in total.values()),
            *(f"{x:.2f}" for x in whole.values()),
        ]
    )
    headings = [
        "layer",
        "times",
        "weights, KB",
        "us",
        "weights near, us",
        "fewer inputs, us",
        "bytes",
        "products",
    ]
    return report.Table("At most so many times faster:", headings, lines, whole)


if __name__ == "__main__":
    main()

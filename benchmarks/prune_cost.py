"""What pruning and calibrating a ResNet of the usual size takes: seconds and peak memory of a process of its own.

Weights are random: the arithmetic is that of trained ones. Each way to calibrate runs in a fresh process.

    python benchmarks/prune_cost.py --layers 50 --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import report
import torch
import transformers
from prune_models import peak_mb
from train_resnet import ResNet

import specqd
from specqd.passes import Pipeline
from specqd.program import Program

_SHAPES = {
    18: {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    50: {"hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3], "layer_type": "bottleneck"},
}


def main() -> None:
    """Measure each way, print, and write what `report` writes."""
    options = _options()
    if options.alone:
        print(json.dumps(_measured(options)))
        return
    rows = []
    for method in options.methods:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", "--methods", method]
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(
                command,
                env=os.environ | {"SPECQD_CACHE": empty},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    lines = [
        [row["calibration"], f"{row['layer_mse']:.4f}", f"{row['seconds']:.0f}", f"{row['peak_mb']:.0f}"]
        for row in rows
    ]
    title = f"{options.sparsity:.0%} sparse, calibrated on {options.samples} fractals of 224 x 224:"
    table = report.Table(title, ["calibration", "layer error", "s", "peak MB"], lines)
    details = {"model": f"ResNet-{options.layers}", "threads": options.threads}
    report.write(f"prune_cost-ResNet-{options.layers}", [table], details, rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what pruning a ResNet takes.")
    parser.add_argument("--layers", type=int, choices=sorted(_SHAPES), default=50)
    parser.add_argument("--sparsity", type=float, default=0.65)
    parser.add_argument("--samples", type=int, default=300, help="images to calibrate on")
    parser.add_argument(
        "--methods", nargs="+", default=["correct", "closed"], help="of calibrate; adam takes long"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="measure in this process and print its row")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and 16 images")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.samples = 18, 16
    return options


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = transformers.ResNetConfig(**_SHAPES[options.layers], num_labels=1000)
    net = ResNet(transformers.ResNetForImageClassification(config).eval())
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = Pipeline.parse("fold-batch-norm")(specqd.capture(net, (torch.zeros(16, 3, 224, 224),), shapes))
    how = f"sparsify{{sparsity={options.sparsity}}}, calibrate{{method={options.methods[0]},samples={options.samples}}}"
    began = time.perf_counter()
    pruned = Pipeline.parse(how)(program)
    seconds = time.perf_counter() - began
    return {
        "model": f"ResNet-{options.layers}", "method": "magnitude", "sparsity": options.sparsity, "precision": "float",
        "data": "fractals", "calibration": options.methods[0], "seconds": round(seconds, 1),
        "peak_mb": round(peak_mb()), "seed": 0, "layer_mse": _error(pruned),
    }  # fmt: skip


def _error(pruned: Program) -> float:
    """Return the layers' mean squared error on the calibration data, as a share of the output, as the pass noted it."""
    notes = [text for event in pruned.history for _, text in event.noted if " of the output to " in text]
    after = [float(text.rsplit(" ", 1)[1].rstrip("%")) / 100 for text in notes]
    return round(sum(after) / max(len(after), 1), 6)


if __name__ == "__main__":
    main()

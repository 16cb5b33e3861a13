"""Pictures: quality of a compressed cache against its size, and time per token against the length of the text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from kv_tables import Row, error, loss_of, variant_of
from kv_tasks import LONG

__all__ = ["plot", "plot_time"]


def plot(samples: Sequence[Row], dim: int, file: Path) -> None:
    """Draw perplexity loss and retrieval against size, of the methods alone and KVCrush, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib")
        return
    lines: dict[str, dict[float, list[Row]]] = {}
    for row in samples:
        variant = variant_of(row)
        if variant.method in (variant.scorer, "kvcrush random"):
            name = str(replace(variant, ratio=1, format="bf16"))
            name = f"{name}, rounded" if variant.format != "bf16" else name
            lines.setdefault(name, {}).setdefault(variant.bytes_ratio(dim), []).append(row)
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, sizes) in enumerate(sorted(lines.items())):
        style = (
            "^--"
            if name.startswith("kvcrush")
            else "s:"
            if "rounded" in name
            else "o-"
            if number < 10
            else "D-"
        )
        for axes, value in ((left, _percent_loss), (right, _percent_found)):
            points = [(100 / ratio, value(group)) for ratio, group in sorted(sizes.items())]
            known = [(size, *at) for size, at in points if at]
            if known:
                x, y, error = zip(*known, strict=True)
                axes.errorbar(
                    x,
                    y,
                    error,
                    fmt=style,
                    color=f"C{number % 10}",
                    label=name,
                    capsize=2,
                    markersize=4,
                    linewidth=1,
                )
    for axes, title in ((left, "perplexity loss, %"), (right, "questions answered, % of the full cache's")):
        axes.set(xlabel="cache, % of the full BF16 cache's bytes", title=title, xscale="log")
        axes.set_xticks([12.5, 25, 50], ["12.5", "25", "50"])
        axes.minorticks_off()
    left.set_yscale("symlog", linthresh=1)
    left.set_yticks([0, 1, 3, 10, 30, 60], ["0", "1", "3", "10", "30", "60"])
    left.set_ylim(bottom=-0.5)
    left.axhline(1, color="grey", linewidth=0.5)
    named: dict[str, Any] = {}
    for axes in (right, left):
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        [named[name] for name in sorted(named)], sorted(named), loc="outside right center", fontsize=8
    )
    figure.savefig(file, dpi=110)


def plot_time(rounds: Sequence[Row], file: Path) -> None:
    """Draw milliseconds a token against tokens of context, if matplotlib is there.

    `rounds` are those of kv_selection.py: a `length`, and for each way to decode its `tokens/s`. Bars reach from the
    quickest to the slowest round.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib")
        return
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    lengths = sorted({row["length"] for row in rounds})
    for name in [key for key, value in rounds[0].items() if isinstance(value, dict) and "tokens/s" in value]:
        taken = [
            [1000 / row[name]["tokens/s"] for row in rounds if row["length"] == length] for length in lengths
        ]
        middle = [median(of) for of in taken]
        below = [at - min(of) for at, of in zip(middle, taken, strict=True)]
        above = [max(of) - at for at, of in zip(middle, taken, strict=True)]
        axes.errorbar(
            lengths, middle, (below, above), fmt="o-", label=name, capsize=2, markersize=4, linewidth=1
        )
    axes.set(xlabel="tokens of context", ylabel="milliseconds a token", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=110)


def _percent_loss(group: Iterable[Row]) -> tuple[float, float] | None:
    found = error([loss_of(row) for row in group if row["task"] == LONG])
    return found and (100 * math.expm1(found[0]), 100 * math.exp(found[0]) * found[1])


def _percent_found(group: Iterable[Row]) -> tuple[float, float] | None:
    found = error([float(row["found"]) for row in group if row["task"] == "asked before"])
    return found and (100 * found[0], 100 * found[1])

"""Pictures of what `prune_quality.py` measured: quality against sparsity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from prune_tables import Row, name_of, usual

__all__ = ["plot"]


def plot(rows: Sequence[Row], metric: str, file: Path) -> None:
    """Draw a metric against sparsity, if matplotlib is there; bars reach from seed to seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: it needs matplotlib")
        return
    rows = [
        row
        for row in rows
        if row["metric"] == metric and row["method"] != "dense" and row["pattern"] == "any"
    ]
    panels: dict[str, Callable[[Row], bool]] = {
        "the same masks, calibrated differently": lambda row: row["method"] == "magnitude"
        and row["allocation"] == usual(metric),
        "other masks": lambda row: row["precision"] == "float" and row["calibration"] in ("none", "closed")
        and row["data"] in ("none", "photos", "text"),
    }  # fmt: skip
    figure = Figure(figsize=(14, 5), layout="constrained")
    for axes, (title, suits) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        _draw(axes, [row for row in rows if suits(row)])
        if metric == "perplexity":
            axes.set(yscale="log", ylabel=metric)
        else:
            axes.set(ylabel=f"{metric}, %", ylim=(rows[0]["dense"] - 20, rows[0]["dense"] + 0.5))
        axes.axhline(rows[0]["dense"], color="grey", linewidth=0.5)
        axes.set(xlabel="zeros, % of the weights", title=title)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    lines: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        mask, calibration, data, precision = name_of(row)
        name = ", ".join(
            part for part in (mask, calibration, data, precision) if part not in ("none", "float")
        )
        lines.setdefault(name, {}).setdefault(100 * row["sparsity"], []).append(row["value"])
    for number, (name, points) in enumerate(sorted(lines.items())):
        x, values = zip(*sorted(points.items()), strict=True)
        y = [fmean(of) for of in values]
        below, above = ([abs(end(of) - at) for of, at in zip(values, y, strict=True)] for end in (min, max))
        axes.errorbar(
            x, y, (below, above), fmt="os^D"[number // 10 % 4] + "-", color=f"C{number % 10}", label=name, capsize=2,
            markersize=4, linewidth=1,
        )  # fmt: skip

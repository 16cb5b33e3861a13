"""Tables of what `prune_quality.py` measured: quality by sparsity, and what calibrating takes and gains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import report

__all__ = ["Row", "cost", "name_of", "quality", "usual"]

Row = dict[str, Any]

_KIND = ("method", "allocation", "pattern", "calibration", "data", "precision")


def name_of(row: Row) -> tuple[str, str, str, str]:
    """Return the mask, the calibration, its data and the precision of a row, as tables name them."""
    mask = row["method"] if row["method"] == "dense" else f"{row['method']}, {row['allocation']}"
    mask = f"{row['method']} {row['pattern']}" if row["pattern"] != "any" else mask
    return mask, row["calibration"], row["data"], row["precision"]


def usual(metric: str) -> str:
    """Name the allocation of most cases."""
    return "uniform" if metric == "perplexity" else "normalised"


def quality(rows: Sequence[Row], metric: str, what: str) -> report.Table:
    """Show `what` (`value` or `drop`) of a metric by sparsity, with its spread over seeds."""
    rows = [row for row in rows if row["metric"] == metric]
    shares = sorted({row["sparsity"] for row in rows if row["method"] != "dense"})
    lines, figures = [], {}
    for kind, of_kind in _grouped(rows, _KIND):
        cells = []
        for share in shares:
            found = [row[what] for row in of_kind if row["sparsity"] == share or row["method"] == "dense"]
            cells.append(report.spread(found).show(1 if metric != "perplexity" else 2) if found else "")
            if found:
                figures[f"{metric} {' '.join(kind)} {share}"] = fmean(found)
        lines.append([*name_of(of_kind[0]), *cells])
    before = min((row["dense"] for row in rows), default=0.0)
    said = "its drop, in points," if what == "drop" else "it"
    return report.Table(
        f"{metric[0].upper()}{metric[1:]}: {before:.2f} before; {said} by sparsity:",
        ["mask", "calibration", "on", "precision", *(f"{share:.0%}" for share in shares)],
        lines,
        figures,
    )


def cost(rows: Sequence[Row], metric: str) -> report.Table:
    """Show the error of layers, time and memory of the ways to calibrate the same masks."""
    chosen = [
        row
        for row in rows
        if row["metric"] == metric and row["precision"] == "float" and row["calibration"] != "none"
        and row["data"] != "random" and (row["method"], row["pattern"]) == ("magnitude", "any")
        and row["allocation"] == usual(metric)
    ]  # fmt: skip
    lines = [
        [
            f"{row['sparsity']:.0%}", row["calibration"], row["data"],
            report.spread(r["layer_mse"] for r in same).show(4),
            report.spread(r["seconds"] for r in same).show(1),
            f"{max(r['peak_mb'] for r in same):.0f}",
        ]
        for _, same in _grouped(chosen, ("sparsity", "data", "calibration"))
        for row in same[:1]
    ]  # fmt: skip
    headings = ["zeros", "calibration", "on", "layer error", "s", "peak MB"]
    return report.Table("Mean squared error of a layer's output, as a share of the output:", headings, lines)


def _grouped(rows: Iterable[Row], by: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[field] for field in by), []).append(row)
    return sorted(found.items())

"""Rows of a variant and seed, and tables, from the rows of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import report
from kv_tasks import LONG
from kv_variants import VARIANTS, Variant

__all__ = ["Row", "error", "loss_of", "rows", "tables", "variant_of"]

Row = Mapping[str, Any]


def rows(samples: Sequence[Row], costs: Mapping[str, float], dim: int) -> list[dict[str, Any]]:
    """Summarise samples by variant and seed. What only a compiled engine can measure is null."""
    groups: dict[tuple[Variant, int], list[Row]] = {}
    for row in samples:
        groups.setdefault((variant_of(row), row["seed"]), []).append(row)
    found = []
    for (variant, seed), group in groups.items():
        long, asked = [row for row in group if row["task"] == LONG], _asked(group)
        found.append(
            {
                "method": variant.method,
                "scorer": variant.scorer,
                "format": variant.format,
                "newest": variant.newest,
                "where": "target",
                "tokens_ratio": variant.ratio,
                "bytes_ratio": round(variant.bytes_ratio(dim), 3),
                "ppl_loss": math.exp(mean(map(loss_of, long))) - 1 if long else None,
                "kl": mean(row["kl"] for row in long) if long else None,
                "top1": mean(row["top1"] for row in long) if long else None,
                "retrieval": {task: mean(row["found"] for row in of) for task, of in asked.items()},
                "selection_cost": costs.get(str(variant)),
                "prefill_cost": None,
                "tokens_per_s": None,
                "seed": seed,
            }
        )
    return found


def tables(samples: Sequence[Row], costs: Mapping[str, float], dim: int) -> list[report.Table]:
    """Return one table a size, and one of how KVCrush does against its own scorer on the same samples."""
    of: dict[Variant, list[Row]] = {}
    for row in samples:
        of.setdefault(variant_of(row), []).append(row)
    order = {variant: place for place, variant in enumerate(VARIANTS)}
    of = {variant: of[variant] for variant in sorted(of, key=lambda v: order.get(v, len(order)))}
    sizes = sorted({variant.ratio for variant in of})
    return [_reached(of, dim), *(_at_size(ratio, of, costs, dim) for ratio in sizes), _paired(of)]


_AIMS = {
    "perplexity within 1 %": (math.log1p(0.01), math.inf),
    "retrieval within 1 point": (math.inf, 0.01),
    "both": (math.log1p(0.01), 0.01),
}
"""Most that may be lost: of the logarithm of perplexity, and of the questions that the full cache answers."""


def _reached(of: Mapping[Variant, Sequence[Row]], dim: int) -> report.Table:
    """For each aim the smallest cache that reaches it, of one selection method and of any, random left out."""
    lost = {}
    for variant, group in of.items():
        loss = error([loss_of(row) for row in group if row["task"] == LONG])
        missed = error([1.0 - row["found"] for row in group if row["task"] != LONG])
        if loss and missed and variant.scorer != "random":
            lost[variant] = (loss, missed)
    lines = []
    for aim, most in _AIMS.items():
        fit = [
            v for v, both in lost.items() if all(at[0] <= limit for at, limit in zip(both, most, strict=True))
        ]
        for kind, those in (("any", fit), ("BF16", [v for v in fit if v.format == "bf16"])):
            best = max(those, key=lambda v: v.bytes_ratio(dim), default=None)
            if best is None:
                lines.append([aim, kind, "none", "", "", ""])
                continue
            loss, missed = lost[best]
            size = "" if best.ratio == 1 else f", {best.ratio:g} times fewer tokens"
            lines.append(
                [
                    aim,
                    kind,
                    f"{best}{size}",
                    f"{best.bytes_ratio(dim):.1f}",
                    _show(loss, lambda x: 100 * (math.exp(x) - 1), 1),
                    _show(missed, lambda x: 100 * (1 - x), 0),
                ]
            )
    headings = ["aim", "format", "smallest cache", "fewer bytes", "perplexity, + %", "found, %"]
    return report.Table("The smallest cache that reaches each aim:", headings, lines)


def _at_size(
    ratio: int, of: Mapping[Variant, Sequence[Row]], costs: Mapping[str, float], dim: int
) -> report.Table:
    lines, figures = [], {}
    tasks = sorted({row["task"] for group in of.values() for row in group} - {LONG}, reverse=True)
    for variant, group in of.items():
        if variant.ratio != ratio:
            continue
        long, asked = [row for row in group if row["task"] == LONG], _asked(group)
        loss = error(list(map(loss_of, long)))
        values = {
            "bytes_ratio": variant.bytes_ratio(dim),
            "log_ppl_loss": loss,
            "kl": error([row["kl"] for row in long]),
            "top1": error([row["top1"] for row in long]),
            **{task: error([float(row["found"]) for row in rows_]) for task, rows_ in asked.items()},
        }
        figures[str(variant)] = values
        cost = costs.get(str(variant))
        lines.append(
            [
                str(variant),
                str(len(long)),
                f"{values['bytes_ratio']:.1f}",
                _show(loss, lambda x: 100 * (math.exp(x) - 1), 1),
                _show(values["kl"], float, 3),
                _show(values["top1"], lambda x: 100 * x, 1),
                *(_show(values.get(task), lambda x: 100 * x, 0) for task in tasks),
                "" if cost is None else f"{1000 * cost:.0f}",
            ]
        )
    headings = ["cache", "cuts", "fewer bytes", "perplexity, + %", "KL, nats", "same top-1, %",
                *(f"found, {task}, %" for task in tasks), "selection, ms"]  # fmt: skip
    title = f"{ratio:g} times fewer tokens:" if ratio > 1 else "All tokens, rounded:"
    return report.Table(title, headings, lines, {title.rstrip(":"): figures})


def _paired(of: Mapping[Variant, Sequence[Row]]) -> report.Table:
    lines, figures = [], {}
    for variant, group in of.items():
        alone = replace(variant, method=variant.scorer)
        if variant == alone or alone not in of:
            continue
        theirs = {_sample(row): row for row in of[alone]}
        pairs = [(row, theirs[_sample(row)]) for row in group if _sample(row) in theirs]
        loss = error([loss_of(own) - loss_of(other) for own, other in pairs if own["task"] == LONG])
        found = error([float(own["found"]) - other["found"] for own, other in pairs if own["task"] != LONG])
        figures[f"{variant} at {variant.ratio:g}"] = {"log_ppl": loss, "found": found}
        lines.append(
            [
                str(variant),
                f"{variant.ratio:g}",
                _show(loss, lambda x: 100 * (math.exp(x) - 1), 1),
                _show(found, lambda x: 100 * x, 1),
            ]
        )
    headings = ["cache", "fewer tokens", "perplexity, + %", "found, + points"]
    return report.Table(
        "Against the scorer alone, on the same samples:", headings, lines, {"paired": figures}
    )


def variant_of(row: Row) -> Variant:
    return Variant(row["method"], row["scorer"], row["ratio"], row["format"], row["newest"])


def _sample(row: Row) -> tuple[str, str, int]:
    return row["task"], row["name"], row["seed"]


def loss_of(row: Row) -> float:
    return row["nll"] - row["full_nll"]


def _asked(group: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in group:
        if row["task"] != LONG:
            found.setdefault(row["task"], []).append(row)
    return found


def error(values: Sequence[float]) -> tuple[float, float] | None:
    """Return mean and standard error, None of nothing; the samples count as independent."""
    if not values:
        return None
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _show(value: tuple[float, float] | None, unit: Callable[[float], float], digits: int) -> str:
    if value is None:
        return ""
    low, high = unit(value[0] - value[1]), unit(value[0] + value[1])
    return f"{unit(value[0]):.{digits}f} ± {abs(high - low) / 2:.{digits}f}"

"""Single passes after a prompt: the figures of `specqd bench` that need no answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from specqd.prompts import PASSAGE
from specqd.runtime.model import Model

__all__ = ["VERIFY_ROWS", "draft_steps", "prefill", "verify_cost"]

VERIFY_ROWS = range(1, 9)
"""Rows of the timed verify passes."""

_PREFILL = 512  # tokens


def draft_steps(model: Model, prompt: Sequence[int], steps: int, gbps: float) -> dict[str, Any]:
    """Time single steps of the first draft after a prompt, as if the draft decoded alone."""
    engine = model.engine
    if len(engine.manifest.chain) < 2:
        return {"draft_tokens_per_s": None, "draft_bandwidth_fraction": None}
    draft = engine.manifest.chain[1]
    model.generate(prompt, 1)
    seconds, read = [], []
    for i in range(steps):
        at = min(len(prompt) + i, engine.capacity - 1)
        seconds.append(_time(model, draft, 1, at))
        read.append(engine.step_bytes(draft, 1, at + 1) / seconds[-1])
    return {
        "draft_tokens_per_s": 1 / median(seconds),
        "draft_bandwidth_fraction": median(read) / 1e9 / gbps,
    }


def verify_cost(model: Model, prompt: Sequence[int], rounds: int) -> list[float]:
    """Time of a target pass with 1 to 8 rows over one with 1 row: the median over rounds of all eight."""
    target = model.engine.manifest.chain[0]
    model.generate(prompt, 1)
    sizes = [rows for rows in VERIFY_ROWS if rows in model.engine.rows(target, every_row=True)]
    ratios: dict[int, list[float]] = {rows: [] for rows in sizes}
    for _ in range(rounds):
        taken = {rows: _time(model, target, rows, len(prompt)) for rows in sizes}
        for rows in sizes:
            ratios[rows].append(taken[rows] / taken[1])
    return [median(ratios[rows]) for rows in sizes]


def prefill(model: Model, repeats: int) -> float:
    """Tokens a second of a long prompt alone."""
    tokens = (model.text.encode(PASSAGE * 8) * 8)[: min(_PREFILL, model.engine.capacity)]
    rates = [model.generate(tokens, 1).stats.prefill_tokens_per_s for _ in range(repeats)]
    return median(rates)


def _time(model: Model, entry: str, rows: int, at: int) -> float:
    tokens = [1] * rows
    began = time.perf_counter()
    model.engine.step(entry, tokens, at)
    return time.perf_counter() - began

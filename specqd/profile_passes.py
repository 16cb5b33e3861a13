"""Passes of a language model, timed for `specqd profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from specqd.artifact import Artifact
from specqd.profile import Row
from specqd.runtime.engine import Engine

__all__ = ["passes"]


def passes(
    artifact: Artifact, runs: int, threads: int, tell: Callable[[str, int, int], None]
) -> tuple[list[Row], float]:
    """Time a pass of each entry and row count in turns, after a text that fills half of the cache.

    Returns rows, and the seconds of a target's pass of one row. Raises as Engine does.
    """
    engine = Engine(artifact, threads)
    start = engine.capacity // 2
    kinds = [(f.entry, f.rows) for f in engine.manifest.functions if f.entry in engine.entries]
    kinds = [kind for kind in dict.fromkeys(kinds) if start + kind[1] <= engine.capacity]
    for entry in engine.entries:
        for at in range(0, start, most := max(engine.rows(entry))):
            engine.feed(entry, [1] * min(most, start - at), at)
    taken: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for run in range(runs):
        tell("timing passes", run, runs)
        for entry, rows in kinds:
            began = time.perf_counter()
            engine.feed(entry, [1] * rows, start)
            taken[entry, rows].append(time.perf_counter() - began)
    found = []
    for (entry, rows), seconds in taken.items():
        size = engine.step_bytes(entry, rows, start + rows)
        name = f"{entry}, {rows} row{'s' if rows > 1 else ''}"
        found.append(Row(name, 1, median(seconds), None, size / median(seconds) / 1e9, "pass", entry))
    target = engine.manifest.chain[0]
    return found, median(taken[target, min(rows for entry, rows in kinds if entry == target)])

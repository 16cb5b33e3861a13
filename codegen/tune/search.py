"""The search: which kernel is looked at next, and which of its schedules are tried, until the time is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from specqd.codegen.dense_kernels import ConvSpec, GemmSpec, Schedule, schedules
from specqd.codegen.isa import ISA
from specqd.codegen.tune.database import Database
from specqd.errors import CodegenError

__all__ = ["search"]

Spec = ConvSpec | GemmSpec
#: schedules that are built and run together, beside the usual one
_TOGETHER = 6


class Measure(Protocol):
    """Times schedules of a kernel: see specqd.codegen.tune.measure."""

    def __call__(self, spec: Spec, schedules: Sequence[Schedule]) -> np.ndarray:
        """Return the seconds of each schedule in each of several rounds, `[rounds, schedules]`."""
        ...


def search(
    workloads: Mapping[Spec, int],
    isa: ISA,
    database: Database,
    measure: Measure,
    limit: float,
    tell: Callable[[str, int, int], None],
) -> None:
    """Measure schedules of kernels, which are called so many times each, for `limit` seconds, into the database.

    Kernels with most work go first, and each again the later the more was tried of it. Of one, schedules that differ
    least from the best one so far are next. Each round has the usual schedule, of whose time the others are shares; the
    worst round counts, and what seems to be the best has two more, so that little is quick by chance.

    Raises:
        CodegenError: a kernel cannot be measured as it is.
    """
    spaces = {spec: space for spec in workloads if len(space := schedules(spec, isa)) > 1}
    batches: Counter[Spec] = Counter()
    began = time.monotonic()
    while spaces and (spent := time.monotonic() - began) < limit:
        spec = max(spaces, key=lambda s: workloads[s] * s.flops / (1 + batches[s]))
        gained = sum(database.best(s) is not None for s in workloads)
        tell(f"tuning {len(workloads)} kernels, {gained} of them faster", int(spent), int(limit))
        usual = spaces[spec][0]
        chosen = _next(spec, spaces[spec][1:], database.schedule(spec) or usual, database)
        if not chosen:
            del spaces[spec]
            continue
        seconds = measure(spec, [usual, *chosen])
        if np.isinf(seconds[:, 0]).any():
            raise CodegenError(
                f"{spec} did not run where it was to be measured, or not in time: see that the machine is idle, and of "
                "this one's kind, or compile without tuning"
            )
        shares = (seconds[:, 1:] / seconds[:, :1]).max(0)
        at, known = int(shares.argmin()), database.best(spec)
        if shares[at] < (known.share if known else 1.0):
            again = measure(spec, [chosen[at], usual])
            shares[at] = max(shares[at], *(again[:, 0] / again[:, 1]))
        for schedule, share in zip(chosen, shares.tolist(), strict=True):
            database.record(spec, schedule, share)
        batches[spec] += 1


def _next(spec: Spec, space: list[Schedule], best: Schedule, database: Database) -> list[Schedule]:
    left = [schedule for schedule in space if not database.measured(spec, schedule)]
    fields = vars(best)
    left.sort(key=lambda schedule: sum(vars(schedule)[name] != fields[name] for name in fields))
    return left[:_TOGETHER]

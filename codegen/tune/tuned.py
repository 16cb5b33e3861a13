"""Schedules for the kernels of a program: those that are known, after a search if there is time for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from specqd.codegen.dense_kernels import ConvSpec, GemmSpec, Schedule
from specqd.codegen.general.lower import lower
from specqd.codegen.isa import ISA
from specqd.codegen.tune.database import Database
from specqd.codegen.tune.measure import Measuring
from specqd.codegen.tune.search import search
from specqd.program import Program
from specqd.runtime.cpu import cpu_name
from specqd.tuning import TunedKernel, Tuning

__all__ = ["tuned"]


def tuned(
    program: Program, isa: ISA, tuning: Tuning, tell: Callable[[str, int, int], None]
) -> tuple[dict[ConvSpec | GemmSpec, Schedule], tuple[TunedKernel, ...]]:
    """Return the schedules that are better than the usual ones, by kernel, and how much.

    Raises:
        CodegenError: the program cannot be compiled.
        InputError: the database is none, or no RPC tracker answers.
    """
    workloads: Counter[ConvSpec | GemmSpec] = Counter()
    lower(program, program.target, isa, lambda spec: workloads.update([spec]))
    database = Database(Path(tuning.database), cpu_name(), isa)
    database.add(tuning.known)
    if tuning.minutes:
        with Measuring(isa, tuning.tracker) as measure:
            search(workloads, isa, database, measure, 60 * tuning.minutes, tell)
    found = {spec: schedule for spec in workloads if (schedule := database.schedule(spec))}
    return found, tuple(kernel for spec in found if (kernel := database.best(spec)))

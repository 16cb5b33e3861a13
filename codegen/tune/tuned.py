"""What is known of the kernels of a program, after a search if there is time for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from specqd.codegen.dense_kernels import ConvSpec, GemmSpec, Schedule
from specqd.codegen.general.lower import lower
from specqd.codegen.isa import ISA
from specqd.codegen.tune.database import Database
from specqd.codegen.tune.measure import Measuring
from specqd.codegen.tune.search import search
from specqd.program import Program
from specqd.runtime.cpu import cpu_name
from specqd.tuning import TunedKernel, Tuning

__all__ = ["Chosen", "tuned"]


class Chosen:
    """Chooses schedules by a database; without one, kernels are cut as they are by themselves.

    Attributes:
        kernels: what was chosen, by workload.
    """

    def __init__(self, database: Database | None) -> None:
        """Nothing is chosen yet."""
        self._database = database
        self.kernels: dict[str, TunedKernel] = {}

    def __call__(self, spec: ConvSpec | GemmSpec) -> Schedule | None:
        """Return the schedule of a kernel; None for the usual one."""
        schedule = self._database.schedule(spec) if self._database else None
        if self._database and schedule and (kernel := self._database.best(spec)):
            self.kernels[kernel.workload] = kernel
        return schedule


def tuned(program: Program, isa: ISA, tuning: Tuning, tell: Callable[[str, int, int], None]) -> Database:
    """Return the database, with what was found out now.

    Raises:
        CodegenError: the program cannot be compiled.
        InputError: the database is none, or no RPC tracker answers.
    """
    database = Database(tuning.database, cpu_name(), isa)
    database.add(tuning.known)
    if tuning.minutes:
        workloads: Counter[ConvSpec | GemmSpec] = Counter()
        lower(program, program.target, isa, lambda spec: workloads.update([spec]))
        with Measuring(isa, tuning.tracker) as measure:
            search(workloads, isa, database, measure, 60 * tuning.minutes, tell)
    return database

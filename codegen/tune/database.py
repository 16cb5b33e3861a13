"""What was measured of kernels: a file of JSON lines, to which searches append as they go."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from specqd.codegen.dense_kernels import ConvSpec, GemmSpec, Schedule, schedule_of
from specqd.codegen.isa import ISA
from specqd.errors import InputError
from specqd.tuning import TunedKernel

__all__ = ["Database", "workload"]

#: a schedule has to take less than this share of the usual one's time to be preferred: less is noise
_GAIN = 0.97


def workload(spec: ConvSpec | GemmSpec) -> str:
    """Return the text that stands for what a kernel computes."""
    return repr(spec)


class Database:
    """Schedules of kernels on one CPU, each with its time as a share of the usual schedule's.

    A line is a TunedKernel. What an interrupted search left of one at the end is passed over, and then overwritten.
    """

    def __init__(self, file: Path, cpu: str, isa: ISA) -> None:
        """Read what the file holds of this CPU; it need not exist.

        Raises:
            InputError: the file is none of these.
        """
        self.file, self._cpu, self._isa = file, cpu, isa
        self._known: dict[str, dict[tuple[tuple[str, int], ...], float]] = {}
        try:
            text = file.read_bytes().decode() if file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is no database of tuned kernels: {error}") from error
        whole, _, rest = text.rpartition("\n")
        if not rest.startswith("{"):  # which no search left
            whole, rest = text, ""
        self._unfinished = len(rest.encode())
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._note(TunedKernel.model_validate_json(line))
            except ValueError as error:
                raise InputError(
                    f"line {number} of {file} is no tuned kernel; mend or delete the file"
                ) from error

    def _note(self, kernel: TunedKernel) -> None:
        if (kernel.cpu, kernel.isa) == (self._cpu, self._isa.name):
            self._known.setdefault(kernel.workload, {})[_key(kernel.schedule)] = kernel.share

    def add(self, kernels: Iterable[TunedKernel]) -> None:
        """Take what another database, or an artifact, knows; it is kept in memory only."""
        for kernel in kernels:
            self._note(kernel)

    def record(self, spec: ConvSpec | GemmSpec, schedule: Schedule, share: float) -> None:
        """Keep a measurement; infinity: the schedule does not compile, or takes too long."""
        kernel = self._kernel(spec, dataclasses.asdict(schedule), share)
        self._note(kernel)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            file.truncate(file.tell() - self._unfinished)
            file.write(json.dumps(kernel.model_dump()).encode() + b"\n")
        self._unfinished = 0

    def measured(self, spec: ConvSpec | GemmSpec, schedule: Schedule) -> bool:
        """Whether a schedule was measured."""
        return _key(dataclasses.asdict(schedule)) in self._known.get(workload(spec), {})

    def best(self, spec: ConvSpec | GemmSpec) -> TunedKernel | None:
        """Return the schedule that took the least; None if none is clearly quicker than the usual one."""
        known = self._known.get(workload(spec), {})
        if not known:
            return None
        fields = min(known, key=known.__getitem__)
        return self._kernel(spec, dict(fields), known[fields]) if known[fields] < _GAIN else None

    def schedule(self, spec: ConvSpec | GemmSpec) -> Schedule | None:
        """Return the best schedule, if this version of the kernels still has it."""
        found = self.best(spec)
        return None if found is None else schedule_of(spec, self._isa, found.schedule)

    def _kernel(self, spec: ConvSpec | GemmSpec, schedule: Mapping[str, int], share: float) -> TunedKernel:
        return TunedKernel(
            cpu=self._cpu, isa=self._isa.name, workload=workload(spec), schedule=dict(schedule), share=share
        )


def _key(fields: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(fields.items()))

"""What may be said about tuning, how long to search, where, what is known; and what is known of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from specqd.errors import InputError
from specqd.verified import cache_directory

__all__ = ["TunedKernel", "Tuning"]


class TunedKernel(BaseModel):
    """A schedule of a kernel on a CPU of this name, and its time as a share of the usual schedule's (codegen/tune)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cpu: str
    isa: str
    workload: str
    schedule: dict[str, int]
    share: float


@dataclass(frozen=True)
class Tuning:
    """How the kernels of a module get their schedules, beyond what codegen chooses by itself.

    Attributes:
        minutes: to measure schedules for; 0 takes what was measured before, of this and of other models.
        tracker: HOST:PORT or HOST:PORT/KEY of a TVM RPC tracker whose servers measure, in place of this machine. They
            need the same kind of CPU. The key is `specqd` if none is given.
        database: file of what was measured, which grows with each search; a search goes on where it was.
        known: what others have measured on such a CPU, as an artifact's manifest lists it.
    """

    minutes: float = 5.0
    tracker: str | None = None
    database: Path = field(default_factory=lambda: cache_directory() / "tuned-kernels.jsonl")
    known: tuple[TunedKernel, ...] = ()

    def __post_init__(self) -> None:
        """Check the time."""
        if not 0 <= self.minutes < 1e4:
            raise InputError(
                f"cannot tune for {self.minutes:g} minutes: give 0, which measures nothing, or more"
            )

"""The figures of `specqd profile`: the time of each kernel, and what of the machine's best it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specqd.artifact import open_artifact
from specqd.errors import InputError
from specqd.peaks import Peaks, measure_peaks
from specqd.runtime.cpu import cpu_name
from specqd.runtime.threads import available_cpus

__all__ = ["Profile", "Row", "profile"]


@dataclass(frozen=True)
class Row:
    """A kernel, or a pass of a language model.

    Attributes:
        name: the function.
        calls: how often one run calls it.
        seconds: of one run, in all its calls together; the median over runs.
        gflops: GFLOP/s of a product; None for what is none, or is not known.
        gbps: GB/s of all that it is given and gives, whether it lies in a cache or not.
        operator: what it is for.
        module: where in the model, `*` for several numbers.
    """

    name: str
    calls: int
    seconds: float
    gflops: float | None
    gbps: float
    operator: str
    module: str


@dataclass(frozen=True)
class Profile:
    """Rows, kernels the longest first; the seconds of a run that nobody watches; and what the machine gives at most."""

    rows: tuple[Row, ...]
    run_seconds: float
    peaks: Peaks
    cpu: str
    isa: str

    def figures(self) -> dict[str, Any]:
        """Give all of it as plain values, with `peak_fraction` and `bandwidth_fraction` of each row."""
        found = asdict(self)
        for row in found["rows"]:
            row["peak_fraction"] = None if row["gflops"] is None else row["gflops"] / self.peaks.gflops
            row["bandwidth_fraction"] = row["gbps"] / self.peaks.gbps
        return found


def profile(
    directory: str | Path,
    *,
    runs: int = 30,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Time what an artifact of a module calls, on random inputs, or the passes of a language model.

    `sizes` gives dynamic sizes by name; without, one is 16, or as near to that as it may be.

    Raises:
        InputError: an option is out of range, or a size is none of the artifact's.
        ArtifactError: the artifact cannot be loaded.
    """
    if runs < 1:
        raise InputError(f"{runs} runs give no time: ask for 1 or more")
    artifact, tell = open_artifact(Path(directory)), progress or (lambda what, done, of: None)
    threads = threads or available_cpus()
    if artifact.manifest.module is None:
        if sizes:
            raise InputError(f"{directory} is a language model, which has no sizes to give")
        from specqd.profile_passes import passes

        rows, seconds = passes(artifact, runs, threads, tell)
    else:
        from specqd.profile_kernels import kernels

        rows, seconds = kernels(artifact, runs, threads, dict(sizes or {}), tell)
    tell("measuring the machine", 0, 0)
    peaks = measure_peaks(artifact.manifest.isa, threads)
    return Profile(tuple(rows), seconds, peaks, cpu_name(), artifact.manifest.isa)

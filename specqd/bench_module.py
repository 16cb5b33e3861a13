"""The figures of `specqd bench` for a module: its latency, beside those of other engines on the same model.

Engines run in processes of their own, because threads of several in one process slow each other; the processes are
asked in turns, so that a machine that slows down slows all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from specqd.artifact import open_artifact
from specqd.errors import ArtifactError, InputError
from specqd.profile_kernels import example_inputs
from specqd.runtime.cpu import cpu_name
from specqd.runtime.threads import available_cpus

__all__ = ["run_module"]

_PEERS = ("eager", "inductor", "onnxruntime")
_ROUNDS = 9
_SECONDS = 0.25  # that an engine runs at a time


def run_module(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    quick: bool = False,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure an artifact of a module on random inputs; return figures by name, times in ms.

    `against` is the `.pt2` file that the artifact was compiled from: eager torch, torch.compile and, where it and onnx
    are installed, onnxruntime run that. `ratios` are times of the others over ours, the medians over rounds, and
    `differences` the largest differences from eager torch's outputs. What a peer cannot run is in `left_out`, with why.

    Raises:
        InputError: an option is out of range, or `against` is no `.pt2` file.
        ArtifactError: the artifact does not run.
    """
    threads = threads or available_cpus()
    if against is not None and (Path(against).suffix != ".pt2" or not Path(against).is_file()):
        raise InputError(f"{against} is no .pt2 file: give what the artifact was compiled from")
    tell, rounds = progress or (lambda what, done, of: None), 3 if quick else _ROUNDS
    manifest = open_artifact(Path(directory)).manifest
    if manifest.module is None:
        raise InputError(f"{directory} is a language model, which `against` and sizes are not for")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given = example_inputs(manifest.module, dict(sizes or {}))
        np.savez(folder / "inputs.npz", *given)
        engines, left_out = {}, {}
        for name in ("specqd", *(_PEERS if against else ())):
            tell(f"starting {name}", 0, 0)
            engine = _Engine(name, str(directory if name == "specqd" else against), folder, threads)
            stack.callback(engine.end)
            if engine.fault:
                left_out[name] = engine.fault
            else:
                engines[name] = engine
        if "specqd" in left_out:
            raise ArtifactError(f"{directory} does not run in a fresh process: {left_out['specqd']}")
        times: dict[str, list[float]] = {name: [] for name in engines}
        for at in range(rounds):
            tell("measuring in turns", at, rounds)
            for name, engine in engines.items():
                times[name].append(engine.measure(_SECONDS))
        differences = {name: _difference(folder, name) for name in engines if "eager" in engines}
    return {
        "ms": {name: median(taken) for name, taken in times.items()},
        "ratios": {name: _ratio(taken, times["specqd"]) for name, taken in times.items() if name != "specqd"},
        "differences": {name: value for name, value in differences.items() if name != "eager"},
        "left_out": left_out,
        "inputs": [f"{array.dtype} {list(array.shape)}" for array in given],
        "threads": threads,
        "cpu": cpu_name(),
        "isa": manifest.isa,
    }


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def _difference(folder: Path, name: str) -> float:
    """Return the largest difference from eager torch's outputs: inf if other ones came, NaN if only one has a NaN."""
    with np.load(folder / "eager.npz") as eager, np.load(folder / f"{name}.npz") as own:
        expected, got = ([stored[key].astype(np.float64) for key in stored.files] for stored in (eager, own))
    if [a.shape for a in got] != [b.shape for b in expected]:
        return float("inf")
    return float(np.max([_apart(*pair) for pair in zip(got, expected, strict=True)], initial=0.0))


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    unlike = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    return float(np.abs(a[unlike] - b[unlike]).max(initial=0.0))


class _Engine:
    """A process that has loaded a model, and runs it for as long as it is asked to."""

    def __init__(self, name: str, model: str, folder: Path, threads: int) -> None:
        """Start it, let it run once and write its outputs; `fault` says why it cannot."""
        command = [sys.executable, "-m", "specqd.bench_engine", name, model, str(folder), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.fault = str(self._answer().get("fault", ""))

    def measure(self, seconds: float) -> float:
        """Return the median time of a call, in ms, over so many seconds."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a process that has ended; that is what its answer says
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        answer = self._answer()
        if "ms" not in answer:
            raise ArtifactError(f"an engine ended while it was measured: {answer['fault']}")
        return float(answer["ms"])

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"fault": "the process ended without a word"}

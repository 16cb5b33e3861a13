"""Build: the entry of a module, compiled into a shared library with its weights as they are packed."""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from specqd.codegen.checked_file import read_checked, write_checked
from specqd.codegen.general.lower import Lowered, lower
from specqd.codegen.isa import ISA
from specqd.codegen.tune.tuned import Chosen, tuned
from specqd.errors import CodegenError
from specqd.manifest import Compiled, ModuleRecord, TensorRecord
from specqd.program import Program
from specqd.tuning import Tuning

__all__ = ["build"]

Progress = Callable[[str, int, int], None]


class Parameters(Mapping[str, np.ndarray]):
    """Arrays by name, made when they are asked for, so that only one is in memory at a time."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        """Remember how each is made."""
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> np.ndarray:
        """Make one array."""
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Count the arrays."""
        return len(self._makers)


def build(
    program: Program,
    isa: ISA,
    progress: Progress | None = None,
    cache: Path | None = None,
    tuning: Tuning | None = None,
) -> Compiled:
    """Compile the target of a program of a module for `isa`.

    `progress(what, done, of)` is told of each step; with `cache`, a library compiled before from the same functions
    is taken from that folder; with `tuning`, kernels have schedules that were measured.

    Raises:
        CodegenError: the graph cannot be compiled.
        InputError: the database of tuned kernels is none, or no RPC tracker answers.
    """
    tell = progress or (lambda what, done, of: None)
    chosen = Chosen(tuned(program, isa, tuning, tell) if tuning else None)
    tell("lowering the graph", 0, 2)
    lowered = lower(program, program.target, isa, chosen)
    tell("compiling", 1, 2)
    library = _library(lowered, isa, cache)
    tell("compiled", 2, 2)
    taken = [TensorRecord(name=n, dtype=d, shape=s) for n, d, s in lowered.inputs]
    given = [TensorRecord(name=f"output_{i}", dtype=d, shape=s) for i, (d, s) in enumerate(lowered.outputs)]
    inputs = len(program.target.inputs)
    states = taken[inputs:]
    record = ModuleRecord(
        inputs=tuple(taken[:inputs]),
        outputs=tuple(given[: len(given) - len(states)]),
        states=tuple(states),
        ranges=dict(lowered.ranges),
        parameters=tuple(lowered.parameters),
        kernels=lowered.calls,
        tuned=tuple(chosen.kernels.values()),
    )
    triple = f"{platform.machine()}-unknown-{platform.system().lower()}-gnu"
    weights = Parameters({name: make for name, (_, make) in lowered.parameters.items()})
    return Compiled(library, weights, (), isa.name, tuple(isa.features), triple, record)


def _library(lowered: Lowered, isa: ISA, cache: Path | None) -> bytes:
    text = lowered.module.script() + str(isa.target()) + tvm.__version__
    stored = cache / f"{hashlib.sha256(text.encode()).hexdigest()}.so" if cache else None
    if stored is not None and (known := read_checked(stored)) is not None:
        return known
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lib.so"
        try:
            with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
                target = tvm.target.Target(isa.target())
                relax.build(lowered.module, target, relax_pipeline=_pipeline()).export_library(str(path))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
            raise CodegenError(f"TVM could not compile the module for {isa.name}: {lines[-1]}") from error
        library = path.read_bytes()
    if stored is not None:
        write_checked(stored, library)
    return library


def _pipeline() -> Any:
    """What turns calls of kernels into code of Relax's virtual machine, with memory that is planned and reused."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )

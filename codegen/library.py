"""Build: every function of a program, compiled into one shared library with its packed weights."""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from specqd.codegen.checked_file import read_checked, write_checked
from specqd.codegen.isa import ISA
from specqd.codegen.pack import Packed, pack
from specqd.codegen.sparse_kernels import PRECISIONS, choose
from specqd.errors import CodegenError
from specqd.manifest import OBSERVER, Arg, Compiled, Function, Refused
from specqd.program import Program
from specqd.reference import propagate

__all__ = ["Weights", "build", "machine_code"]

#: rows of a pass: single steps and verification, then pieces of a prompt
VERIFY_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
PREFILL_ROWS = (32, 64, 128)

Progress = Callable[[str, int, int], None]


class Weights(Mapping[str, np.ndarray]):
    """Packed arrays by name, laid out when asked for, so that only one is in memory at a time."""

    def __init__(self, packed: Mapping[str, Packed], stored: Mapping[str, Tensor]) -> None:
        """Remember what to pack and from where."""
        self._packed, self._stored = dict(packed), stored

    def __getitem__(self, name: str) -> np.ndarray:
        """Pack one array."""
        return pack(self._packed[name], self._stored)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._packed)

    def __len__(self) -> int:
        """Count the arrays."""
        return len(self._packed)


def _plan(program: Program) -> Iterator[tuple[str, int, bool]]:
    filled: set[str] = set()
    for name in program.chain:
        # A draft verifies what a draft of its own proposes; one that shares a cache finds the prompt in it.
        yield from ((name, rows, False) for rows in VERIFY_ROWS)
        caches = {str(n.target) for n in program.entry(name).graph.nodes if n.op == "placeholder"}
        if not caches <= filled:
            yield from ((name, rows, True) for rows in PREFILL_ROWS)
        filled |= caches
    if program.selection:
        # For a draft it looks on while the target checks what the draft proposed.
        yield OBSERVER, program.selection.window, program.selection.entry == program.chain[0]


def build(
    program: Program, isa: ISA, progress: Progress | None = None, cache: Path | None = None
) -> Compiled:
    """Compile every entry of the chain for `isa`.

    `progress(what, done, of)` is told of each step; with `cache`, a library compiled before from the same functions
    is taken from that folder. Raises CodegenError for a graph that cannot be compiled.
    """
    from specqd.codegen.lower.attending import movers
    from specqd.codegen.lower.function import lower
    from specqd.codegen.lower.last_row import last_row

    plan = list(_plan(program))
    tell = progress or (lambda what, done, of: None)
    primitives: dict[str, Any] = {}
    functions: list[Function] = []
    packed: dict[str, Packed] = {}
    for i, (name, rows, last_only) in enumerate(plan):
        tell(f"lowering {name} for {rows} rows", i, len(plan) + 1)
        symbol = f"{name}_{rows}"
        entry = program.entry(name)
        if last_only:
            propagate(program, entry, rows)
            entry = last_row(entry)
        propagate(program, entry, rows)
        primitives[symbol], parameters = lower(program, entry, isa, rows, symbol, last_only)
        args = tuple(
            Arg(name=p.name, kind=p.kind, dtype=p.dtype, shape=p.shape, gathered=p.gathered)
            for p in parameters
        )
        functions.append(Function(entry=name, rows=rows, last_only=last_only, symbol=symbol, args=args))
        packed.update({p.name: p.packed for p in parameters if p.packed is not None})
    if program.selection and program.selection.entry == program.chain[0]:
        primitives |= movers(program, isa)
    tell("compiling", len(plan), len(plan) + 1)
    library, triple = _library(primitives, isa, cache)
    tell("compiled", len(plan) + 1, len(plan) + 1)
    weights = Weights(packed, program.weights)
    dense = tuple(_kept_dense(program, packed, functions, isa))
    return Compiled(library, weights, tuple(functions), isa.name, tuple(isa.features), triple, refusals=dense)


def _kept_dense(
    program: Program, packed: Mapping[str, Packed], functions: Sequence[Function], isa: ISA
) -> Iterator[Refused]:
    """Say why matrices that have zeros are stored with them."""
    for name, array in packed.items():
        if array.form in PRECISIONS:
            why = choose([program.weights[source] for source in array.sources], array.form, isa).why
            if why:
                entry = next(f.entry for f in functions if any(arg.name == name for arg in f.args))
                yield Refused(step="codegen", entry=entry, node=name, why=f"stored densely: {why}")


def _library(primitives: dict[str, Any], isa: ISA, cache: Path | None) -> tuple[bytes, str]:
    import tvm

    from specqd.codegen.kernels.stream import stream_read

    module = tvm.IRModule({**primitives, "stream_read": stream_read(isa)})
    triple = f"{platform.machine()}-unknown-{platform.system().lower()}-gnu"
    text = module.script() + str(isa.target()) + tvm.__version__
    key = hashlib.sha256(text.encode()).hexdigest()
    stored = cache / f"{key}.so" if cache else None
    if stored is not None and (known := read_checked(stored)) is not None:
        return known, triple
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lib.so"
        try:
            machine_code(module, isa).export_library(str(path))
        except Exception as error:
            raise CodegenError(
                f"TVM could not compile the program for {isa.name}: {_first_line(error)}"
            ) from error
        library = path.read_bytes()
    if stored is not None:
        write_checked(stored, library)
    return library, triple


def machine_code(module: Any, isa: ISA) -> Any:
    """Compile TIR functions for an instruction set with TVM."""
    import tvm

    # This pass takes half of TVM's time to find that local buffers are no larger than what is used of them.
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        return tvm.compile(module, target=tvm.target.Target(isa.target()))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

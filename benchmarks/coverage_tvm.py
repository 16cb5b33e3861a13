"""TVM's own importer of ONNX models, on the same tests: what it compiles, and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import tvm
from onnx import numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

__all__ = ["RefusedError", "imported"]


class RefusedError(Exception):
    """The importer, or the compiler after it, gave up."""


def imported(model: onnx.ModelProto, arrays: list[Any], bound: list[int]) -> Any:
    """Import, compile and run a model; inputs in `bound` become initialisers."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    names = [one.name for one in model.graph.input]
    for at in bound:
        fixed.graph.initializer.append(numpy_helper.from_array(np.asarray(arrays[at]), names[at]))
    kept = [one for at, one in enumerate(model.graph.input) if at not in bound]
    del fixed.graph.input[:]
    fixed.graph.input.extend(kept)
    try:
        module = relax.transform.DecomposeOpsForInference()(from_onnx(fixed))
        machine = relax.VirtualMachine(relax.build(relax.transform.LegalizeOps()(module), "llvm"), tvm.cpu())
    except Exception as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    given = [tvm.runtime.tensor(np.asarray(x)) for at, x in enumerate(arrays) if at not in bound]
    found = machine["main"](*given)
    parts = [found] if hasattr(found, "numpy") else list(found)
    return tuple(part.numpy() for part in parts)

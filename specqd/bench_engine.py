"""One engine of `specqd bench` for a module, in a process of its own: `python -m specqd.bench_engine`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

__all__ = ["main"]

_WARM_UP = 5


def main(name: str, model: str, folder: str, threads: str) -> None:
    """Load a model, run it on `inputs.npz`, write its outputs, then time it whenever a line gives seconds.

    Every answer is a line of JSON: `{}` when ready, `{"ms": ...}` of a measurement, `{"fault": ...}` of what failed.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        with np.load(Path(folder) / "inputs.npz") as stored:
            given = [stored[key] for key in stored.files]
        call = _LOADERS[name](model, given, int(threads))
        outputs = call()
        found = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        np.savez(Path(folder) / f"{name}.npz", *(np.asarray(value) for value in found))
        for _ in range(_WARM_UP):
            call()
    except Exception as error:  # whatever a peer raises is why it is left out
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        print(json.dumps({"fault": f"{type(error).__name__}: {lines[0]}"}), file=answers, flush=True)
        return
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"ms": _timed(call, float(line))}), file=answers, flush=True)


def _timed(call: Callable[[], Any], seconds: float) -> float:
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return median(taken) * 1e3


def _specqd(model: str, given: list[np.ndarray], threads: int) -> Callable[[], Any]:
    from specqd.runtime.module import Module

    module = Module.open(model, threads)
    return lambda: module(*given)


def _eager(
    model: str, given: list[np.ndarray], threads: int, change: Callable[[Any], Any] = lambda x: x
) -> Any:
    import torch

    import specqd.ops  # noqa: F401  (registers the operators that a file may name)

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(array) for array in given]
    module = change(torch.export.load(model).module())

    def call() -> Any:
        with torch.no_grad():
            return module(*tensors)

    return call


def _inductor(model: str, given: list[np.ndarray], threads: int) -> Callable[[], Any]:
    import torch

    return _eager(model, given, threads, torch.compile)


def _onnxruntime(model: str, given: list[np.ndarray], threads: int) -> Callable[[], Any]:
    import onnxruntime
    import torch

    exported: Any = torch.onnx.export(torch.export.load(model), dynamo=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), options)
    named = dict(zip((i.name for i in session.get_inputs()), given, strict=True))
    return lambda: session.run(None, named)


_LOADERS: dict[str, Callable[[str, list[np.ndarray], int], Any]] = {
    "specqd": _specqd,
    "eager": _eager,
    "inductor": _inductor,
    "onnxruntime": _onnxruntime,
}

if __name__ == "__main__":
    main(*sys.argv[1:])

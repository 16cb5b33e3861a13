"""The engines of `models.py`, and one engine's side of it: times models in a process of its own.

python model_engines.py prepare MODEL FOLDER PRECISION...     compiles and exports; prints facts as JSON
python model_engines.py ENGINE THREADS                        times a precision of a MODEL, prepared in its FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from model_zoo import build
from peers.protocol import serve, timing

__all__ = ["ENGINES", "PRECISIONS", "Engine", "in_precision", "onnxruntime_session", "openvino_network"]

#: `float32-direct`: without Winograd's algorithm, as the arithmetic of the others is
PRECISIONS = ("float32", "float32-direct", "bf16", "int8")


class Engine(NamedTuple):
    """An engine: what makes a function that runs a model, the precisions it has, and the packages it needs."""

    start: Callable[..., Callable[[], Any]]
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()


def in_precision(model: str, module: Any, x: Any, precision: str) -> tuple[Any, Any]:
    """Return the Program of a model in a precision, and the one that peers get, who make BF16 of float32 themselves."""
    import specqd
    from specqd.passes import Pipeline
    from specqd.passes.prune.calibration_data import Data
    from specqd.passes.quantize.quantize_int8 import QuantizeINT8

    program = Pipeline.parse("fold-batch-norm")(specqd.capture(module, (x,)))
    if precision == "int8":
        program = QuantizeINT8(data=Data.of(build(model, 4)[1]))(program).program
    return Pipeline.parse("cast-bf16")(program) if precision == "bf16" else program, program


def prepare(model: str, folder: Path, precisions: list[str]) -> dict[str, Any]:
    """Compile each precision into FOLDER/PRECISION, and export what peers read; gives facts by precision."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import specqd
    from specqd.build import compile_model

    module, x = build(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        wanted = module(x)
    facts: dict[str, Any] = {"flops": counter.get_total_flops()}
    for precision in precisions:
        began = time.perf_counter()
        program, plain = in_precision(model, module, x, precision)
        place = folder / precision
        with _direct_sums() if precision == "float32-direct" else nullcontext():
            compile_model(program, place, pipeline="", force=True)
        seconds = time.perf_counter() - began
        found = specqd.load(place)(x)
        difference = (found - wanted).norm() / wanted.norm()
        facts[precision] = {"build_s": round(seconds, 1), "error": round(float(difference), 5)}
        if find_spec("onnxscript") and precision != "float32-direct":
            torch.onnx.export(plain.module(), (x,), place / "model.onnx", dynamo=True, verbose=False)
    return facts


@contextmanager
def _direct_sums() -> Iterator[None]:
    """Have no convolution computed by Winograd's algorithm meanwhile."""
    import specqd.codegen.general.kernels  # noqa: F401

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("specqd.codegen.") and hasattr(module, "by_winograd"):
                stack.enter_context(mock.patch.object(module, "by_winograd", return_value=False))
        yield


def _specqd(model: str, folder: str, precision: str, threads: int) -> Callable[[], Any]:
    import specqd

    run, x = specqd.load(Path(folder) / precision, threads=threads), _input(model)
    return lambda: run(x)


def _torch(
    model: str, folder: str, precision: str, threads: int, *, compiled: bool = False
) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module, x = build(model)
    module, x = module.to(dtype), x.to(dtype) if x.is_floating_point() else x
    if compiled:
        torch._inductor.config.freezing = True
        module = torch.compile(module)

    def run() -> Any:
        with torch.no_grad():
            return module(x)

    return run


def _onnxruntime(model: str, folder: str, precision: str, threads: int) -> Callable[[], Any]:
    session = onnxruntime_session(f"{folder}/{precision}/model.onnx", threads)
    given = {session.get_inputs()[0].name: _input(model)}
    return lambda: session.run(None, given)


def _openvino(model: str, folder: str, precision: str, threads: int) -> Callable[[], Any]:
    network = openvino_network(f"{folder}/{precision}/model.onnx", precision, threads)
    request, x = network.create_infer_request(), _input(model)
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


def onnxruntime_session(file: str, threads: int) -> Any:
    """Load an ONNX file into onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options)


def openvino_network(file: str, precision: str, threads: int) -> Any:
    """Compile an ONNX file with OpenVINO, which makes BF16 of float32 itself."""
    import openvino

    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(file, "CPU", properties)


def _input(model: str) -> Any:
    return build(model)[1].numpy()


ENGINES = {
    "specqd": Engine(_specqd, PRECISIONS),
    "eager": Engine(_torch, ("float32", "bf16")),
    "inductor": Engine(partial(_torch, compiled=True), ("float32", "bf16")),
    # It has no BF16 convolutions on CPUs.
    "onnxruntime": Engine(_onnxruntime, ("float32", "int8"), ("onnxruntime", "onnxscript")),
    "openvino": Engine(_openvino, ("float32", "bf16", "int8"), ("openvino", "onnxscript")),
}


def _start() -> Mapping[str, Callable[..., Any]]:
    name, threads = sys.argv[1:]
    return timing(partial(ENGINES[name].start, threads=int(threads)))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        print(json.dumps(prepare(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])))
    else:
        serve(_start)

"""One engine's side of `models.py`, in a process of its own.

    python model_engines.py prepare MODEL FOLDER PRECISION...     compiles and exports; prints facts as JSON
    python model_engines.py ENGINE THREADS                        reads requests from stdin, answers with seconds

A request is a line of JSON with `model`, `folder`, `precision` and `repeats`; an answer the median of the seconds, or
`null` and why the engine does not run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from model_zoo import build

__all__: list[str] = []


def prepare(model: str, folder: Path, precisions: list[str]) -> dict[str, Any]:
    """Compile each precision into FOLDER/PRECISION, and export what peers read; gives facts by precision."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import specqd
    from specqd.build import compile_model
    from specqd.passes import Pipeline
    from specqd.passes.prune.calibration_data import Data
    from specqd.passes.quantize.quantize_int8 import QuantizeINT8

    module, x = build(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        wanted = module(x)
    _, samples = build(model, 4)
    facts: dict[str, Any] = {"flops": counter.get_total_flops()}
    for precision in precisions:
        began = time.perf_counter()
        program = Pipeline.parse("fold-batch-norm")(specqd.capture(module, (x,)))
        if precision == "int8":
            program = QuantizeINT8(data=Data.of(samples))(program).program
        elif precision == "bf16":
            program = Pipeline.parse("cast-bf16")(program)
        place = folder / precision
        compile_model(program, place, pipeline="", force=True)
        seconds = time.perf_counter() - began
        found = specqd.load(place)(x)
        difference = (found - wanted).norm() / wanted.norm()
        facts[precision] = {"build_s": round(seconds, 1), "error": round(float(difference), 5)}
        if precision != "bf16":
            _export(program.module(), x, place / "model.onnx")
    return facts


def _export(module: Any, x: Any, path: Path) -> None:
    """Write an ONNX file, unless its exporter is not installed."""
    try:
        import onnxscript  # noqa: F401
        import torch
    except ImportError:
        return
    torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)


def _specqd(asked: dict[str, Any], threads: int) -> Callable[[], Any]:
    import specqd

    run, x = specqd.load(Path(asked["folder"]) / asked["precision"], threads=threads), _input(asked)
    return lambda: run(x)


def _eager(asked: dict[str, Any], threads: int) -> Callable[[], Any]:
    return _torch(asked, threads, compiled=False)


def _inductor(asked: dict[str, Any], threads: int) -> Callable[[], Any]:
    return _torch(asked, threads, compiled=True)


def _torch(asked: dict[str, Any], threads: int, *, compiled: bool) -> Callable[[], Any]:
    import torch

    if asked["precision"] == "int8":
        raise NotImplementedError("not compared")
    torch.set_num_threads(threads)
    dtype = getattr(torch, {"bf16": "bfloat16"}.get(asked["precision"], "float32"))
    module, x = build(asked["model"])
    module, x = module.to(dtype), x.to(dtype) if x.is_floating_point() else x
    if compiled:
        torch._inductor.config.freezing = True
        module = torch.compile(module)

    def run() -> Any:
        with torch.no_grad():
            return module(x)

    return run


def _onnxruntime(asked: dict[str, Any], threads: int) -> Callable[[], Any]:
    import onnxruntime

    if asked["precision"] == "bf16":
        raise NotImplementedError("it has no BF16 convolutions on CPUs")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(_onnx(asked)), options)
    given = {session.get_inputs()[0].name: _input(asked)}
    return lambda: session.run(None, given)


def _openvino(asked: dict[str, Any], threads: int) -> Callable[[], Any]:
    import openvino

    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if asked["precision"] == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(_onnx(asked), "CPU", properties).create_infer_request()
    x = _input(asked)
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


def _onnx(asked: dict[str, Any]) -> Path:
    kind = "int8" if asked["precision"] == "int8" else "float32"
    return Path(asked["folder"]) / kind / "model.onnx"


def _input(asked: dict[str, Any]) -> Any:
    return build(asked["model"])[1].numpy()


ENGINES = {
    "specqd": _specqd, "eager": _eager, "inductor": _inductor, "onnxruntime": _onnxruntime, "openvino": _openvino,
}  # fmt: skip


def main() -> None:
    """Prepare, or answer until stdin ends."""
    engine, *rest = sys.argv[1:]
    if engine == "prepare":
        print(json.dumps(prepare(rest[0], Path(rest[1]), rest[2:])))
        return
    print("ready", flush=True)
    known: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        repeats, key = asked.pop("repeats"), json.dumps(asked)
        try:
            if key not in known:
                known[key] = ENGINES[engine](asked, int(rest[0]))
            run = known[key]
            run()
            taken = []
            for _ in range(repeats):
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
            print(json.dumps([median(taken), ""]), flush=True)
        except Exception as error:
            print(json.dumps([None, f"{type(error).__name__}: {str(error).splitlines()[:1]}"]), flush=True)


if __name__ == "__main__":
    main()

"""The engines of `streaming.py`, and one engine's side of it: times the stream in a process of its own.

python streaming_engines.py prepare FOLDER SIZE PRECISION      compiles and exports; prints facts as JSON
python streaming_engines.py ENGINE THREADS                     times a precision, prepared in its FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from model_engines import Engine, onnxruntime_session, openvino_network
from peers.protocol import serve, timing

__all__ = ["ENGINES", "PRECISIONS"]

_ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "bf16", "int8", "int8-sparse")
_CLASSES, _FRAMES = 400, 16


def prepare(folder: Path, size: int, precision: str) -> dict[str, Any]:
    """Compile a precision into FOLDER/PRECISION, and export what peers read; gives its facts."""
    import torch

    import specqd
    from specqd.passes import Pipeline
    from specqd.passes.prune.calibration_data import Data
    from specqd.passes.quantize.quantize_int8 import QuantizeINT8
    from specqd.reference import new_caches

    model = _model().eval()
    clips = torch.randn(2, _FRAMES, 3, size, size, generator=torch.Generator().manual_seed(0))
    compiled = _example("compiled")
    with torch.no_grad():
        wanted = model(clips[:1])
    captured = compiled.capture(model, clips[:1])
    int8 = QuantizeINT8(data=Data.of(clips))
    # Which zeros are left, calibrated or not, does not matter to the speed.
    steps: dict[str, Callable[[Any], Any]] = {
        "fp32": lambda p: p,
        "bf16": Pipeline.parse("cast-bf16"),
        "int8": lambda p: int8(p).program,
        "int8-sparse": lambda p: int8(Pipeline.parse("sparsify{sparsity=0.65}")(p)).program,
    }
    began = time.perf_counter()
    program = Pipeline.parse("stream-frames")(steps[precision](captured))
    place = folder / precision
    specqd.compile(program, place, pipeline="", force=True)
    seconds = time.perf_counter() - began
    stream = specqd.load(place)
    for at in range(_FRAMES):
        found = stream(clips[:1, at : at + 1])
    given = (clips[:1, :1], *new_caches(program).values())
    module = program.module()
    torch.export.save(torch.export.export(module, given, strict=False), place / "stream.pt2")
    if precision != "bf16" and find_spec("onnxscript"):  # which peers make of float32 themselves
        torch.onnx.export(module, given, place / "model.onnx", dynamo=True, verbose=False)
    return {"build_s": round(seconds, 1), "error": float((found - wanted).norm() / wanted.norm())}


def _model() -> Any:
    from coverage_models import mend_torchvision

    mend_torchvision()
    import torch

    torch.manual_seed(0)
    encoders, model = _example("encoders"), _example("model")
    return model.ClipModel(encoders.FrameEncoder("resnet34"), model.Transformer(_CLASSES, _FRAMES))


def _example(module: str) -> Any:
    from importlib import import_module

    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))
    return import_module(f"examples.action_recognition.{module}")


def _specqd(folder: str, precision: str, threads: int) -> Callable[[], Any]:
    import specqd

    stream = specqd.load(Path(folder) / precision, threads=threads)
    frame = np.random.default_rng(0).standard_normal(stream.record.inputs[0].shape, np.float32)
    return lambda: stream(frame)


def _torch(folder: str, precision: str, threads: int, *, compiled: bool = False) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    exported = torch.export.load(Path(folder) / "fp32" / "stream.pt2")
    module: Any = exported.module().to(dtype)
    frame, *states = (given.to(dtype) for given in exported.example_inputs[0])
    if compiled:
        torch._inductor.config.freezing = True
        module = torch.compile(module)

    def run() -> Any:
        with torch.no_grad():
            logits, *states[:] = module(frame, *states)
        return logits

    return run


def _onnxruntime(folder: str, precision: str, threads: int) -> Callable[[], Any]:
    session = onnxruntime_session(f"{folder}/{precision}/model.onnx", threads)
    names = [given.name for given in session.get_inputs()]
    frame, *states = (np.zeros(given.shape, np.float32) for given in session.get_inputs())

    def run() -> Any:
        logits, *states[:] = session.run(None, dict(zip(names, (frame, *states), strict=True)))
        return logits

    return run


def _openvino(folder: str, precision: str, threads: int) -> Callable[[], Any]:
    exported = "fp32" if precision == "bf16" else precision
    network = openvino_network(f"{folder}/{exported}/model.onnx", precision, threads)
    request = network.create_infer_request()
    frame, *states = (np.zeros(tuple(given.shape), np.float32) for given in network.inputs)

    def run() -> Any:
        found = request.infer([frame, *states])
        logits, *states[:] = (found[output] for output in network.outputs)
        return logits

    return run


_INT8 = ("int8", "int8-sparse")
ENGINES = {
    "specqd": Engine(_specqd, PRECISIONS),
    "eager": Engine(_torch, ("fp32", "bf16")),
    "inductor": Engine(partial(_torch, compiled=True), ("fp32", "bf16")),
    # It has no BF16 convolutions on CPUs.
    "onnxruntime": Engine(_onnxruntime, ("fp32", *_INT8), ("onnxruntime", "onnxscript")),
    "openvino": Engine(_openvino, PRECISIONS, ("openvino", "onnxscript")),
}


def _start() -> Mapping[str, Callable[..., Any]]:
    name, threads = sys.argv[1:]
    return timing(partial(ENGINES[name].start, threads=int(threads)))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        print(json.dumps(prepare(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
    else:
        serve(_start)

"""One engine's side of `dense_kernels.py`, in a process of its own: reads layers from stdin, answers with seconds.

    python dense_peers.py torch|onnxruntime THREADS

A line in is a layer as JSON with `dtype`, `threads` and `repeats`; a line out is the median of the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

__all__: list[str] = []


def _torch(layer: dict[str, Any]) -> Callable[[], Any]:
    import torch

    dtype = getattr(torch, layer["dtype"])
    if layer["kernel"]:
        size, kernel, groups = layer["size"], layer["kernel"], layer["groups"]
        module = torch.nn.Conv2d(
            layer["inputs"], layer["outputs"], kernel, layer["stride"], kernel // 2, groups=groups
        )
        x = torch.randn(1, layer["inputs"], size, size, dtype=dtype)
    else:
        module = torch.nn.Linear(layer["inputs"], layer["outputs"])
        x = torch.randn(layer["size"], layer["inputs"], dtype=dtype)
    module = module.to(dtype).eval()

    def run() -> Any:
        with torch.inference_mode():
            return module(x)

    return run


def _onnxruntime(layer: dict[str, Any]) -> Callable[[], Any]:
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    size, kernel = layer["size"], layer["kernel"]
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(layer["outputs"]).astype(np.float32)
    if kernel:
        shape = [1, layer["inputs"], size, size]
        weight = rng.standard_normal([layer["outputs"], layer["inputs"] // layer["groups"], kernel, kernel])
        stride = [layer["stride"]] * 2
        node = helper.make_node(
            "Conv", ["x", "w", "b"], ["y"], pads=[kernel // 2] * 4, strides=stride, group=layer["groups"]
        )
    else:
        shape = [size, layer["inputs"]]
        weight = rng.standard_normal([layer["inputs"], layer["outputs"]])
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    # Reordered on entry and exit, as it is alone; inside a model that would be shared among layers.
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.astype(np.float32), "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = layer["threads"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    x = rng.standard_normal(shape).astype(np.float32)
    return lambda: session.run(None, {"x": x})


@cache
def _runner(engine: str, text: str) -> Callable[[], Any]:
    return {"torch": _torch, "onnxruntime": _onnxruntime}[engine](json.loads(text))


def main() -> None:
    """Answer until stdin ends."""
    engine = sys.argv[1]
    if engine == "torch":
        import torch

        torch.set_num_threads(int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        repeats = asked.pop("repeats")
        run = _runner(engine, json.dumps(asked))
        run()
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
        print(median(taken), flush=True)


if __name__ == "__main__":
    main()

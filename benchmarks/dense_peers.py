"""One engine's side of `dense_kernels.py`: times layers in a process of its own.

    python dense_peers.py torch|onnxruntime THREADS

A layer has its `dtype` with it, and the number of threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from peers.protocol import serve, timing

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


def _start() -> Mapping[str, Callable[..., Any]]:
    engine, threads = sys.argv[1:]
    if engine == "torch":
        import torch

        torch.set_num_threads(int(threads))
    return timing({"torch": _torch, "onnxruntime": _onnxruntime}[engine])


if __name__ == "__main__":
    serve(_start)

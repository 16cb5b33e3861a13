"""Our side of `dense_kernels.py`: kernels of layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import tvm
from dense_layers import Layer

from specqd.codegen.dense_kernels import (
    ConvSpec,
    Epilogue,
    GemmSpec,
    Requantise,
    conv2d,
    from_blocks,
    gemm,
    to_blocks,
)
from specqd.codegen.isa import ISA
from specqd.codegen.library import machine_code
from specqd.runtime.library import aligned, tensor

__all__ = ["PRECISIONS", "kernel"]

#: what a kernel of a precision reads
PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "uint8"}


def kernel(
    layer: Layer, dtype: str, isa: ISA, converted: bool = False, weights: int = 1
) -> tuple[ConvSpec | GemmSpec, Callable[[int], float]]:
    """Compile our kernel with a bias; gives what runs it so many times and returns the median of the seconds.

    If `converted`, from NCHW and back. It takes one after another of so many `weights`.
    """
    ending: dict[str, Any] = {"dtype": dtype, "out_dtype": dtype, "epilogue": Epilogue(bias=True)}
    if dtype == "uint8":
        ending |= {"zero": 128, "requantise": Requantise(0.1, 128)}
    if layer.kernel:
        pad, square = layer.kernel // 2, (layer.kernel, layer.kernel)
        spec: ConvSpec | GemmSpec = ConvSpec(
            1, layer.inputs, layer.size, layer.size, layer.outputs, square, (layer.stride,) * 2, (pad,) * 4,
            groups=layer.groups, planes=layer.inputs == 3, **ending,
        )  # fmt: skip
        functions = [conv2d(spec, isa, "f0")]
        if converted:
            out = (1, layer.outputs, spec.out_height, spec.out_width)
            functions.append(from_blocks(out, dtype, isa, "f1"))
            if not spec.planes:
                functions.append(to_blocks((1, layer.inputs, layer.size, layer.size), dtype, isa, "f2"))
    else:
        spec = GemmSpec(layer.size, layer.outputs, layer.inputs, **ending)
        functions = [gemm(spec, isa, "f0")]
    compiled = machine_code(tvm.IRModule({f"f{i}": f for i, f in enumerate(functions)}), isa).jit()
    rng = np.random.default_rng(0)
    calls = [
        (compiled[f"f{i}"], [_random(rng, buffer) for buffer in function.params])
        for i, function in enumerate(functions)
    ]

    of_kernel = calls[0][1]
    at = 1  # after the input
    turns = cycle([of_kernel[at], *(_random(rng, functions[0].params[at]) for _ in range(weights - 1))])

    def run(repeats: int) -> float:
        taken = []
        for _ in range(repeats):
            of_kernel[at] = next(turns)
            began = time.perf_counter()
            for call, arguments in calls:
                call(*arguments)
            taken.append(time.perf_counter() - began)
        return median(taken)

    return spec, run


def _random(rng: np.random.Generator, buffer: Any) -> Any:
    shape, dtype = [int(size) for size in buffer.shape], str(buffer.dtype)
    stored = np.dtype(dtype)
    made = aligned(math.prod(shape) * stored.itemsize).view(stored).reshape(shape)
    if dtype == "uint16":  # BF16
        made[...] = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return tensor(made)
    made[...] = (
        rng.standard_normal(shape) if dtype == "float32" else rng.integers(-99, 99, shape).astype(stored)
    )
    return tensor(made)

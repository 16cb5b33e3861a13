"""Kernels of `sparse_kernels.py`: one product, over many copies of its weight so that they come from memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import tvm
from torch import Tensor
from tvm.script.ir_builder import IRBuilder

from specqd.codegen.isa import ISA
from specqd.codegen.kernels.dense import dense
from specqd.codegen.kernels.integer import GROUP, integer
from specqd.codegen.library import machine_code
from specqd.codegen.lower.step import Step
from specqd.codegen.pack import Packed, pack, sparse
from specqd.codegen.sparse_kernels import PARTS, PRECISIONS, Choice, Sparse
from specqd.codegen.tir import I, load, store, tirx
from specqd.passes.quantize import int8, mxfp4
from specqd.runtime.library import aligned, tensor

__all__ = ["Arrays", "arrays", "compiled", "stored"]

Arrays = dict[str, np.ndarray]


def stored(weight: Tensor, precision: str) -> tuple[Tensor, Tensor | None]:
    """Return a float weight [n, k] as a program would hold it: values, and scales if it has some."""
    if precision == "int8":
        return int8.encode(weight)
    if precision == "mxfp4":
        return mxfp4.encode(weight)
    return weight.bfloat16() if precision == "bf16" else weight, None


def arrays(values: Tensor, scales: Tensor | None, precision: str, choice: Choice) -> Arrays:
    """Pack a weight in the format of a choice, or densely; by the name of the part."""
    kind = PRECISIONS[precision]
    blocks, k = -(-len(values) // 16), values.shape[1] * (2 if kind.paired else 1)
    vectors = blocks * (k // kind.inputs)
    if choice.form is None:
        dtype = {"f32": "float32", "bf16": "int32"}.get(precision, "int8")
        size = vectors * kind.dense_bytes // np.dtype(dtype).itemsize
        wanted = {"values": Packed(("w",), precision, dtype, size)}
    else:
        wanted = dict(zip(PARTS, sparse(("w",), precision, choice.form, choice.sizes), strict=True))
    if scales is not None:
        dtype, size = ("float32", blocks * 16) if precision == "int8" else ("uint8", blocks * k // 2)
        wanted["scales"] = Packed(("s",), f"{precision}_scales", dtype, size)
    weights = {"w": values} if scales is None else {"w": values, "s": scales}
    return {name: pack(packed, weights) for name, packed in wanted.items()}


def compiled(
    n: int, k: int, rows: int, precision: str, choice: Choice, packed: Arrays, copies: int, isa: ISA
) -> tuple[Callable[[], float], np.ndarray]:
    """Compile a product of all copies in turn; give what runs it, returns seconds a copy, and the last result."""
    step = Step(isa, rows)
    held = {name: np.tile(array, copies) for name, array in packed.items()}
    buffers = {name: _argument(step, name, array) for name, array in held.items()}
    inputs = _inputs(rows, k, precision, isa)
    given = [_argument(step, name, array) for name, array in inputs.items()]
    result = step.parameter("y", "scratch", "float32", (rows * n,))
    prelude = I.attr(0, "pragma_import_llvm", isa.prelude) if isa.prelude else nullcontext()
    with (
        IRBuilder() as builder,
        prelude,
        I.attr(0, "pragma_parallel_launch_point", 1),
        I.serial(0, copies) as copy,
    ):

        def finish(row: Any, channel: Any, acc: Any, at: Any) -> None:
            for i in range(0, 16, isa.lanes):
                store(result, row * n + channel + i, load(acc, at + i, isa.lanes), isa.lanes)

        at = {
            name: tirx.Cast("int64", copy) * tirx.const(array.size, "int64") for name, array in packed.items()
        }
        _emit(step, n, k, precision, choice, buffers, at, given, finish)
    function = tirx.PrimFunc([p.buffer for p in step.parameters.values()], builder.get())
    function = function.with_attr({"global_symbol": "f", "tirx.noalias": True})
    call = machine_code(tvm.IRModule({"f": function}), isa).jit()["f"]
    y = _aligned(np.zeros(rows * n, np.float32))
    bound = {name: _aligned(array) for name, array in {**held, **inputs}.items()} | {"y": y}
    arguments = [tensor(bound[name]) for name in step.parameters]

    def run() -> float:
        began = time.perf_counter()
        call(*arguments)
        return (time.perf_counter() - began) / copies

    return run, y


def _emit(
    step: Step,
    n: int,
    k: int,
    precision: str,
    choice: Choice,
    buffers: Mapping[str, Any],
    at: Mapping[str, Any],
    given: list[Any],
    finish: Any,
) -> None:
    weight, offset = buffers["values"], at["values"]
    if choice.form is not None:
        parts = tuple(tuple(of[part] for part in PARTS) for of in (buffers, at))
        weight = Sparse(choice.form, PRECISIONS[precision].bits, *parts)
    if "scales" in buffers:
        scales = (weight, buffers["scales"]), (offset, at["scales"])
        integer(step.isa, step.rows, n, k, tuple(given), *scales, precision, finish, step.phase, step.space)
    else:
        dense(step.isa, step.rows, n, k, given[0], weight, offset, precision, finish, step.phase, step.space)


def _inputs(rows: int, k: int, precision: str, isa: ISA) -> Arrays:
    rng = np.random.default_rng(1)
    if precision in ("int8", "mxfp4"):
        values = rng.integers(-127, 128, (rows, k // GROUP, GROUP)).astype(np.int8)
        sums = values.sum(-1, dtype=np.int32).reshape(-1)
        return {
            "xv": values.reshape(-1).view(np.int32),
            "xs": rng.random(sums.size, np.float32),
            "xq": sums,
        }
    x = torch.from_numpy(rng.standard_normal(rows * k, np.float32))
    pairs = precision == "bf16" and isa.pairs
    return {"x": x.bfloat16().view(torch.int32).numpy() if pairs else x.numpy()}


def _argument(step: Step, name: str, array: np.ndarray) -> Any:
    return step.parameter(name, "scratch", array.dtype.name, (array.size,))


def _aligned(array: np.ndarray) -> np.ndarray:
    made = aligned(array.nbytes).view(array.dtype)[: array.size]
    made[...] = array
    return made

"""One convolution or matrix product, compiled and run on random tensors, beside what torch makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from compiled import EXTENDED, RUNNABLE, array
from torch.nn import functional

from specqd.codegen.dense_kernels import (
    ConvSpec,
    GemmSpec,
    block,
    blocked_shape,
    conv2d,
    corrections,
    gemm,
    pack_channels,
    pack_conv,
    pack_gemm,
)
from specqd.codegen.dense_kernels.spec import RANGE
from specqd.codegen.isa import TABLE
from specqd.codegen.library import machine_code
from specqd.runtime.library import tensor

__all__ = ["KINDS", "SAMPLED_KINDS", "Run", "argument", "blocked", "plain", "run_conv", "run_gemm"]

_SAMPLE = [("avx512_bf16", "uint8"), ("avx512", "float32"), ("avx2", "uint8"), ("generic", "float32")]

#: instruction sets that this CPU has with input types, where they make code that no other makes
KINDS = [
    (isa, dtype)
    for isa in RUNNABLE
    for dtype in ("float32", "bfloat16", "uint8")
    if dtype != "float32" or isa not in ("amx", "avx512_bf16")
]

#: those as parameters of a test, what resembles others for extended runs only
SAMPLED_KINDS = [
    pytest.param(isa, dtype, marks=() if isa == "amx" or (isa, dtype) in _SAMPLE else EXTENDED)
    for isa, dtype in KINDS
]


@dataclass(frozen=True)
class Run:
    """What a kernel gave and the exact result, both plain; `real` is the latter before it is made an integer."""

    out: torch.Tensor
    exact: torch.Tensor
    real: torch.Tensor


def blocked(x: torch.Tensor, dtype: str) -> np.ndarray:
    """Cut NCHW into blocks of channels; what is no channel is one, so that a kernel that reads it is found."""
    n, c, h, w = x.shape
    size = block(c, dtype)
    whole = functional.pad(x, (0, 0, 0, 0, 0, -c % size), value=1)
    return _stored(whole.reshape(n, -1, size, h, w).permute(0, 1, 3, 4, 2).contiguous(), dtype)


def plain(y: torch.Tensor, channels: int) -> torch.Tensor:
    """Join blocks of channels to NCHW."""
    n, blocks, h, w, size = y.shape
    return y.permute(0, 1, 4, 2, 3).reshape(n, blocks * size, h, w)[:, :channels]


def run_conv(spec: ConvSpec, isa: str, rng: torch.Generator, x: torch.Tensor | None = None) -> Run:
    """Compile and run a convolution, of `x` if it is given."""
    if x is None:
        x = _random((spec.batch, spec.in_channels, spec.height, spec.width), spec.dtype, rng)
    weight = _random(
        (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel), _weight_type(spec.dtype), rng
    )
    top, left, bottom, right = spec.padding
    padded = functional.pad(x - spec.zero, (left, right, top, bottom)).double()
    sums = functional.conv2d(padded, weight.double(), None, spec.stride, 0, spec.dilation, spec.groups)
    shape = blocked_shape(spec.batch, spec.out_channels, spec.out_height, spec.out_width, spec.out_dtype)
    given = _stored(x, spec.dtype) if spec.planes else blocked(x, spec.dtype)
    packed = pack_conv(spec, _stored(weight, _weight_type(spec.dtype)))
    call = _Call(spec, isa, conv2d(spec, TABLE[isa], "f"), rng)
    stored, ending = call(
        given, packed, weight, sums, shape, lambda r: blocked(r, spec.out_dtype), (1, -1, 1, 1)
    )
    return Run(plain(stored, spec.out_channels), *ending)


def run_gemm(spec: GemmSpec, isa: str, rng: torch.Generator, rows: tuple[int, ...] = ()) -> list[Run]:
    """Compile a matrix product once and run it for each number of rows."""
    call = _Call(spec, isa, gemm(spec, TABLE[isa], "f"), rng)
    runs = []
    for m in rows or (spec.m or 1,):
        lead = (spec.batch,) if spec.dynamic else ()
        x = _random((*lead, m, spec.k), spec.dtype, rng)
        weight = _random((*lead, spec.n, spec.k), _weight_type(spec.dtype), rng)
        sums = (x - spec.zero).double() @ weight.double().mT
        if spec.dynamic:
            second = _stored(weight if spec.transposed else weight.mT.contiguous(), "float32")
        else:
            second = pack_gemm(spec, _stored(weight, _weight_type(spec.dtype)))
        stored, ending = call(
            _stored(x, spec.dtype),
            second,
            weight,
            sums,
            sums.shape,
            lambda r: _stored(r, spec.out_dtype),
            (-1,),
        )
        runs.append(Run(stored, *ending))
    return runs


class _Call:
    """A compiled kernel with its random bias, scale and residual."""

    def __init__(self, spec: Any, isa: str, function: Any, rng: torch.Generator) -> None:
        self.spec, self.isa, self.rng = spec, TABLE[isa], rng
        self.function = machine_code(tvm.IRModule({"f": function}), TABLE[isa]).jit()["f"]

    def __call__(
        self, x: Any, second: Any, weight: Any, sums: Any, shape: Any, store: Any, channels: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        spec, count = self.spec, sums.shape[channels.index(-1) if len(channels) > 1 else -1]
        arguments, value = [x, second], sums
        if spec.dtype in RANGE:
            arguments.append(corrections(spec, weight.to(torch.int8).numpy(), self.isa))
            if spec.out_dtype != "int32":
                # Real values of a few units, or nearly all outputs of integers would be saturated.
                scale = (torch.rand(count, generator=self.rng) * 2 + 1) / (sums.abs().mean().float() + 1)
                arguments.append(pack_channels(scale.numpy()))
                value = value * scale.double().reshape(channels)
            if spec.open_steps and spec.out_dtype in RANGE:
                summand = spec.summand or spec.requantise
                steps = [1 / spec.requantise.scale, summand.scale, summand.zero]
                arguments.append(np.array(steps, np.float32))
        if spec.epilogue.bias:
            bias = torch.randn(count, generator=self.rng)
            arguments.append(pack_channels(bias.numpy()))
            value = value + bias.double().reshape(channels)
        if spec.epilogue.residual:
            residual = _random(sums.shape, spec.out_dtype, self.rng)
            arguments.append(store(residual))
            value = value + self._real(residual)
        value = _ACTIVATIONS[spec.epilogue.activation](value)
        out = array(shape, _numpy(spec.out_dtype))
        out.view(np.uint8)[...] = 0x7F
        self.function(*map(argument, [*arguments, out]))
        return _loaded(out, spec.out_dtype), (self._exact(value), value)

    def _real(self, stored: torch.Tensor) -> torch.Tensor:
        if self.spec.out_dtype in RANGE:
            how = self.spec.summand or self.spec.requantise
            return (stored.double() - how.zero) * how.scale
        return stored.double()

    def _exact(self, value: torch.Tensor) -> torch.Tensor:
        if self.spec.out_dtype not in RANGE:
            return value
        whole = (value / self.spec.requantise.scale).round() + self.spec.requantise.zero
        return whole.clip(*RANGE[self.spec.out_dtype])


_ACTIVATIONS: dict[str | None, Any] = {
    None: lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "mish": functional.mish,
}


def _weight_type(dtype: str) -> str:
    return "int8" if dtype == "uint8" else dtype


def _numpy(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _random(shape: Any, dtype: str, rng: torch.Generator) -> torch.Tensor:
    """Random values that `dtype` holds, as float32."""
    if dtype in RANGE:
        low, high = RANGE[dtype]
        return torch.randint(low, high + 1, tuple(shape), generator=rng).float()
    values = torch.randn(tuple(shape), generator=rng)
    return values.bfloat16().float() if dtype == "bfloat16" else values


def _stored(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Values in their type; BF16 as its bits."""
    if dtype == "bfloat16":
        return values.bfloat16().contiguous().view(torch.uint16).numpy()
    return values.contiguous().to(getattr(torch, dtype)).numpy()


def _loaded(stored: np.ndarray, dtype: str) -> torch.Tensor:
    made = torch.from_numpy(stored.copy())
    return (made.view(torch.bfloat16) if dtype == "bfloat16" else made).double()


def argument(values: np.ndarray) -> Any:
    """A tensor at a cache line that shares memory with `values` if these lie at one."""
    if values.ctypes.data % 64 or not math.prod(values.shape):
        copy = array(values.shape, values.dtype.name)
        copy[...] = values
        values = copy
    return tensor(values)

"""Kernels called from Relax, as general codegen calls them: a chain in blocks of channels, and rows that are open."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm
from compiled import NATIVE
from torch.nn import functional
from tvm import relax, tirx

from specqd.codegen.dense_kernels import (
    ConvSpec,
    Epilogue,
    GemmSpec,
    blocked_shape,
    conv2d,
    from_blocks,
    gemm,
    pack_channels,
    pack_conv,
    pack_gemm,
    to_blocks,
)


class _Module:
    """A Relax function of one input that is a chain of kernels."""

    def __init__(self, shape: Any) -> None:
        self.builder = relax.BlockBuilder()
        self.x = relax.Var("x", relax.TensorType(shape, "float32"))

    def run(self, x: torch.Tensor, *steps: Any) -> torch.Tensor:
        """Each step is (function, weights, shape of the result)."""
        with self.builder.function("main", [self.x]):
            with self.builder.dataflow():
                value = self.x
                for number, (function, weights, shape) in enumerate(steps):
                    name = self.builder.add_func(function, f"step{number}")
                    arguments = [value, *map(relax.const, weights)]
                    value = self.builder.emit(
                        relax.call_tir(name, arguments, out_ty=relax.TensorType(shape, "float32"))
                    )
                result = self.builder.emit_output(value)
            self.builder.emit_func_output(result)
        built = relax.build(self.builder.get(), target=tvm.target.Target(NATIVE.target()))
        machine = relax.VirtualMachine(built, tvm.cpu())
        return torch.from_numpy(machine["main"](tvm.runtime.tensor(x.numpy())).numpy())


def test_a_chain_in_blocks(rng: torch.Generator) -> None:
    shape, between, after = (1, 24, 9, 9), (1, 40, 9, 9), (1, 40, 5, 5)
    x, first = torch.randn(shape, generator=rng), torch.randn(40, 24, 3, 3, generator=rng)
    second, bias = torch.randn(40, 1, 3, 3, generator=rng), torch.randn(40, generator=rng)
    ends = Epilogue(True, False, "relu")
    dense = ConvSpec(1, 24, 9, 9, 40, (3, 3), padding=(1, 1, 1, 1), epilogue=ends)
    depthwise = ConvSpec(1, 40, 9, 9, 40, (3, 3), (2, 2), (1, 1, 1, 1), groups=40)
    made = _Module(shape).run(
        x,
        (to_blocks(shape, "float32", NATIVE), [], blocked_shape(*shape, "float32")),
        (
            conv2d(dense, NATIVE),
            [pack_conv(dense, first.numpy()), pack_channels(bias.numpy())],
            blocked_shape(*between, "float32"),
        ),
        (
            conv2d(depthwise, NATIVE, "depthwise"),
            [pack_conv(depthwise, second.numpy())],
            blocked_shape(*after, "float32"),
        ),
        (from_blocks(after, "float32", NATIVE), [], after),
    )
    expected = functional.conv2d(x, first, bias, padding=1).relu()
    expected = functional.conv2d(expected, second, stride=2, padding=1, groups=40)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_open_rows(rng: torch.Generator) -> None:
    rows = tirx.Var("rows", "int64")
    x, weight = torch.randn(11, 32, generator=rng), torch.randn(48, 32, generator=rng)
    spec = GemmSpec(None, 48, 32)
    step = gemm(spec, NATIVE), [pack_gemm(spec, weight.numpy())], (rows, 48)
    made = _Module((rows, 32)).run(x, step)
    assert np.allclose(made, x @ weight.T, rtol=0, atol=1e-4)

"""Products with a weight matrix: how each becomes phases, with what follows it applied in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import specqd.ops  # noqa: F401  (registers torch.ops.specqd)
from specqd.codegen.kernels.dense import BLOCK, dense
from specqd.codegen.kernels.integer import GROUP, integer
from specqd.codegen.kernels.refine import refine, scratch_sizes
from specqd.codegen.lower.stored import matrix
from specqd.codegen.lower.values import Index, Value, of_buffer, unravel
from specqd.codegen.pack import Packed
from specqd.codegen.tir import I, f32, i32

__all__ = ["PRODUCTS"]

aten, ops = torch.ops.aten, torch.ops.specqd


def _linear(f: Any, node: fx.Node, chain: list[fx.Node]) -> Value:
    x, weight, *bias = node.args
    result = _Result(f, node, chain, bias[0] if bias else None)
    value = f.argument(x)
    operand, (buffer, offset), kind, n, k = _dense_operands(f, value, weight)
    dense(f.isa, value.size // k, n, k, operand, buffer, offset, kind, result.finish, f.step.phase, f.space)
    return result.value


def _dense_operands(
    f: Any, value: Value, weight: fx.Node, gathered: bool = False
) -> tuple[Any, tuple[Any, Any], str, int, int]:
    """Return what `dense` takes: the rows, the packed weight and where it begins, its kind, n and k."""
    stored = f.program.weights[str(weight.target)]
    n, k = stored.shape
    kind = "bf16" if stored.dtype == torch.bfloat16 and k % 2 == 0 else "f32"
    dtype, size = ("int32", k // 2) if kind == "bf16" else ("float32", k)
    dense = Packed(f.sources(weight), kind, dtype, -(-n // BLOCK) * BLOCK * size)
    packed = f.step.weight(dense, gathered) if gathered else matrix(f, weight, dense)
    return f.step.operand(value, "pairs" if kind == "bf16" and f.isa.pairs else "f32"), packed, kind, n, k


def _linear_integer(kind: str) -> Callable[[Any, fx.Node, list[fx.Node]], Value]:
    def lower(f: Any, node: fx.Node, chain: list[fx.Node]) -> Value:
        x, values, scales, *bias = node.args
        result = _Result(f, node, chain, bias[0] if bias else None)
        _integer(f, kind, f.argument(x), values, scales, result)
        return result.value

    return lower


def _integer(f: Any, kind: str, value: Value, values: fx.Node, scales: fx.Node, result: _Result) -> None:
    n, k = f.program.weights[str(values.target)].shape
    k = k * 2 if kind == "mxfp4" else k
    count, k = value.size // k, -(-k // GROUP) * GROUP
    rows = -(-n // BLOCK) * BLOCK
    sizes = (rows * k // 2, rows * k // GROUP) if kind == "mxfp4" else (rows * k, rows)
    scale_dtype = "uint8" if kind == "mxfp4" else "float32"
    w, w_at = matrix(f, values, Packed(f.sources(values), kind, "int8", sizes[0]))
    s, s_at = f.step.weight(Packed(f.sources(scales), f"{kind}_scales", scale_dtype, sizes[1]))
    operand = f.step.operand(value, "int8")
    integer(f.isa, count, n, k, operand, (w, s), (w_at, s_at), kind, result.finish, f.step.phase, f.space)


def _linear_refined(f: Any, node: fx.Node, chain: list[fx.Node]) -> Value:
    x, codes, scales, bias, weight, best = node.args
    result = _Result(f, node, chain, bias)
    value = f.argument(x)
    _integer(f, "mxfp4", value, codes, scales, result)
    operand, packed, kind, n, k = _dense_operands(f, value, weight, gathered=True)
    rows = value.size // k
    scratch = tuple(f.step.scratch(rows * size, dtype) for dtype, size in scratch_sizes(n, best))
    preview = result.buffer
    refine(f.isa, rows, n, k, best, preview, operand, packed, kind, scratch, result.finish, f.step.phase)
    return result.value


class _Result:
    """Where a matrix product goes: its epilogue applied to the accumulators, block by block."""

    def __init__(self, f: Any, node: fx.Node, chain: list[fx.Node], bias: fx.Node | None) -> None:
        self.f, self.shape = f, tuple(node.meta["val"].shape)
        self.n = self.shape[-1]
        self._read: Callable[[Index], Any] = lambda _: f32(0.0)
        product = Value(self.shape, "float32", lambda index: self._read(index))
        if bias is not None:
            added, product_at = f.argument(bias), product.at
            product = product.with_at(self.shape, lambda index: product_at(index) + added.at([index[-1]]))
        f.env[node] = product
        for n in chain[1:]:
            f.env[n] = f.elementwise(n)
        last = chain[-1] if chain else node
        self.expression = f.env[last]
        self.buffer = f.into.get(last)
        if self.buffer is None:
            self.buffer = f.step.scratch(product.size, "float32")
        f.step.fence(self.buffer)
        self.value = of_buffer(f.space, self.buffer, self.shape, "float32")

    def finish(self, row: Any, channel: Any, acc: Any, at: int) -> None:
        """Store one row of one block of 16 channels."""
        lead = unravel(row, self.shape[:-1], self.f.space)

        def write(i: Any) -> None:
            self._read = lambda _: acc[i + at]
            column = self.f.space.simplify(channel + i)
            value = self.expression.at([*lead, column])
            I.buffer_store(self.buffer, value, [row * self.n + column])

        if self.n % BLOCK == 0:
            self.f.step.over(i32(0), BLOCK, True, write)
            return
        with I.If(channel + BLOCK <= self.n):
            with I.Then():
                self.f.step.over(i32(0), BLOCK, True, write)
            with I.Else(), self.f.step.serial(self.n % BLOCK) as i:
                write(i)


#: operator -> function(lowering, node, epilogue chain) giving its value
PRODUCTS: dict[Any, Callable[[Any, fx.Node, list[fx.Node]], Value]] = {
    aten.linear.default: _linear,
    ops.linear_mxfp4.default: _linear_integer("mxfp4"),
    ops.linear_int8.default: _linear_integer("int8"),
    ops.linear_refined.default: _linear_refined,
}

"""Value: a tensor as an index expression over tensors in memory, so that views and elementwise work own no memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from specqd.codegen.kernels.activations import bf16_bits
from specqd.codegen.tir import bind, tirx

__all__ = [
    "Constant", "Index", "Tensor", "Value", "array", "cast", "const", "converted", "differ", "divide", "flat", "i64",
    "is_nan", "one", "position", "product", "stored", "zero",
]  # fmt: skip

Index = Sequence[Any]


@dataclass(eq=False)
class Tensor:
    """A tensor in memory, row-major: a Relax variable of a shape of ints and TIR expressions."""

    var: Any
    shape: tuple[Any, ...]
    dtype: str
    given: bool = False  # an input or a weight, which a function may not return as its own


@dataclass(frozen=True)
class Constant:
    """A weight, or what was computed from weights alone; `declare` makes the value of another one."""

    name: str
    contents: torch.Tensor
    declare: Callable[[str, torch.Tensor], Value]

    def changed(self, how: str, contents: torch.Tensor) -> Value:
        """Return the value of other contents made of these."""
        return self.declare(f"{self.name}:{how}", contents)


@dataclass(frozen=True)
class Value:
    """A tensor of which `at(index)` gives the TIR expression of one element.

    Attributes:
        shape: ints, or int64 TIR expressions of the dynamic sizes.
        dtype: TVM's name.
        at: from int64 index expressions to the element.
        tensor: set when the value is exactly that tensor.
        cost: operations for an element beyond a load; what costs something is not computed twice.
        simd: whether the expression exists for a vector of elements at once.
        data: set for a constant, which becomes a parameter when it is read.
        blocks: the same elements as `[batch, blocks, height, width, block]`, where channels lie in blocks.
    """

    shape: tuple[Any, ...]
    dtype: str
    at: Callable[[Index], Any] = field(repr=False)
    tensor: Tensor | None = None
    cost: int = 0
    simd: bool = True
    data: Constant | None = None
    blocks: Value | None = None

    def view(self, shape: Sequence[Any], at: Callable[[Index], Any], cost: int = 0) -> Value:
        """Derive a value that is no longer a whole tensor; `cost` comes on top."""
        return replace(
            self, shape=tuple(shape), at=at, tensor=None, data=None, blocks=None, cost=self.cost + cost
        )


def i64(value: Any) -> Any:
    """Make an int64 expression; expressions pass through."""
    return tirx.const(value, "int64") if isinstance(value, int) else value


def stored(dtype: str) -> str:
    """The dtype of elements in memory and of expressions: BF16 is its bits, which TVM cannot misread."""
    return "uint16" if dtype == "bfloat16" else dtype


def array(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a tensor as they lie in memory."""
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def const(value: Any, dtype: str) -> Any:
    """Make a constant of any dtype; infinities and NaN included."""
    if dtype == "bfloat16":
        return tirx.const(int(array(torch.tensor(value, dtype=torch.bfloat16))), "uint16")
    return tirx.const(bool(value) if dtype == "bool" else value, dtype)


def zero(dtype: str) -> Any:
    """The zero of a dtype."""
    return const(0, dtype)


def one(dtype: str) -> Any:
    """The one of a dtype."""
    return const(1, dtype)


def cast(expr: Any, source: str, to: str) -> Any:
    """Convert an element as torch does: to bool by comparing with zero, from bool to 0 or 1."""
    if source == to:
        return expr
    if source == "bfloat16":
        bits = tirx.shift_left(tirx.Cast("int32", expr), tirx.const(16, "int32"))
        return cast(tirx.reinterpret("float32", bits), "float32", to)
    if to == "bfloat16":
        return tirx.Cast("uint16", bf16_bits(bind(cast(expr, source, "float32"))))
    if to == "bool":
        return differ(expr, zero(source), source)
    if source == "bool":
        return tirx.Select(expr, one(to), zero(to))
    return tirx.Cast(to, expr)


def is_nan(expr: Any, dtype: str) -> Any:
    """Whether a float is NaN, by its bits: `x != x` TVM would simplify to false."""
    if dtype == "float32":
        bits = tirx.bitwise_and(tirx.reinterpret("int32", expr), tirx.const(0x7FFFFFFF, "int32"))
        return bits > tirx.const(0x7F800000, "int32")
    if dtype == "float64":
        bits = tirx.bitwise_and(tirx.reinterpret("int64", expr), tirx.const(2**63 - 1, "int64"))
        return bits > tirx.const(0x7FF0000000000000, "int64")
    return tirx.const(False, "bool")


def differ(a: Any, b: Any, dtype: str) -> Any:
    """Whether two elements differ; NaN does from everything, which TVM's own comparison does not say."""
    if dtype.startswith(("float", "bfloat")):
        return tirx.any(a < b, a > b, is_nan(a, dtype), is_nan(b, dtype))
    return tirx.NE(a, b)


def divide(a: Any, b: Any) -> Any:
    """`a / b` of floats; by a constant zero it is `a` times infinity, for TVM folds no division by zero."""
    if isinstance(b, tirx.FloatImm) and b.value == 0:
        return a * const(math.copysign(math.inf, b.value), str(b.ty))
    return a / b


def product(sizes: Sequence[Any]) -> Any:
    """Multiply sizes; an int where all are."""
    result: Any = 1
    for size in sizes:
        result = size if isinstance(result, int) and result == 1 else result * size
    return result


def flat(index: Index, shape: Sequence[Any]) -> Any:
    """Row-major position of an index."""
    result: Any = 0
    for i, size in zip(index, shape, strict=True):
        if isinstance(size, int) and size == 1:
            continue
        result = i if isinstance(result, int) and result == 0 else result * size + i
    return i64(result)


def position(at: Any, shape: Sequence[Any]) -> list[Any]:
    """Index of which `at` is the row-major position."""
    index: list[Any] = [i64(0)] * len(shape)
    dims = [d for d, size in enumerate(shape) if not (isinstance(size, int) and size == 1)]
    for d in reversed(dims):
        if d == dims[0]:
            index[d] = at
            break
        index[d], at = tirx.floormod(at, i64(shape[d])), tirx.floordiv(at, i64(shape[d]))
    return index


def converted(x: Value, dtype: str) -> Value:
    """Give a value another dtype; a constant is converted when the artifact is built."""
    if x.dtype == dtype:
        return x
    if x.data is not None:
        return x.data.changed(dtype, x.data.contents.to(getattr(torch, dtype)))
    blocks = None if x.blocks is None or "bool" in (x.dtype, dtype) else converted(x.blocks, dtype)
    cost = x.cost + (4 if dtype == "bfloat16" else 1)
    return Value(
        x.shape, dtype, lambda i: cast(x.at(i), x.dtype, dtype), cost=cost, simd=x.simd, blocks=blocks
    )

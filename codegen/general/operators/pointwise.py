"""How scalar functions become elementwise operators: operands meet in one dtype, and are broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as KIND
from torch._prims_common import elementwise_dtypes

from specqd.codegen.general import functions
from specqd.codegen.general.codes import DEQUANTIZE, QUANTIZE
from specqd.codegen.general.functions import FLOATS
from specqd.codegen.general.lowering import CHEAP, Lowering
from specqd.codegen.general.values import Value, cast, const
from specqd.codegen.tir import bind, tirx
from specqd.errors import CodegenError

__all__ = ["KIND", "broadcast", "combine", "dtype_of", "elementwise"]

aten, prims = torch.ops.aten, torch.ops.prims

Function = Callable[..., Any]

#: operators that make finite numbers of finite numbers of any size that a network's activations have
_FINITE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.relu.default, aten.hardtanh.default, aten.clamp.default,
    aten.hardswish.default, aten.hardsigmoid.default, aten.silu.default, aten.sigmoid.default, aten.gelu.default,
    aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.tanh.default, aten.maximum.default,
    aten.minimum.default, QUANTIZE, DEQUANTIZE,
}  # fmt: skip

#: operations of a function that is no longer simple arithmetic
LONG = 8


def dtype_of(dtype: torch.dtype) -> str:
    """TVM's name of a dtype; raises CodegenError for one that is not compiled."""
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":  # TVM's own rules for it end the process on some functions
        raise CodegenError("bfloat16 is not compiled yet; convert the module to float32")
    if name.startswith("complex"):
        raise CodegenError(
            f"complex numbers ({name}) are not compiled: write it with real and imaginary parts, each a tensor of its "
            "own, or leave this part of the model to eager torch"
        )
    if name not in (*FLOATS, *functions.INTEGERS, "bool", "float16"):
        raise CodegenError(f"the dtype {name} cannot be compiled")
    return name


def broadcast(lowering: Lowering, value: Value, shape: Sequence[Any]) -> Value:
    """Repeat a value along dimensions of one element, and new ones in front."""
    if len(value.shape) == len(shape) and all(_same(a, b) for a, b in zip(value.shape, shape, strict=True)):
        return value
    if value.cost > CHEAP and lowering.work(*shape) > lowering.work(*value.shape):
        value = lowering.settle(value)
    skip = len(shape) - len(value.shape)
    fixed = [_is_one(size) and not _is_one(shape[skip + d]) for d, size in enumerate(value.shape)]

    def at(index: Sequence[Any]) -> Any:
        return value.at([const(0, "int64") if f else i for i, f in zip(index[skip:], fixed, strict=True)])

    return value.view(shape, at)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _same(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, int) and isinstance(b, int) else a is b or not isinstance(a, int)


def elementwise(
    function: Function, kind: KIND = KIND.DEFAULT, *, simd: bool | Callable[[str], bool] = True, cost: int = 1
) -> Function:
    """Make a rule of `function(dtype, *expressions, **options)`, whose operands meet in one dtype as torch says."""

    def rule(lowering: Lowering, node: fx.Node, *operands: Any, **options: Any) -> Value:
        seen = [
            _seen(arg) for arg in (*node.args, *(v for v in node.kwargs.values() if isinstance(v, fx.Node)))
        ]
        meet, _ = elementwise_dtypes(*(arg for arg in seen if arg is not None), type_promotion_kind=kind)
        return combine(lowering, node, function, operands, options, dtype_of(meet), simd, cost)

    return rule


def combine(
    lowering: Lowering, node: fx.Node, function: Function, operands: Sequence[Any], options: dict[str, Any],
    meet: str, simd: bool | Callable[[str], bool], cost: int,
) -> Value:  # fmt: skip
    """Apply a scalar function to values, which are cast to the dtype `meet`, and numbers."""
    shape = tuple(lowering.sizes(size) for size in node.meta["val"].shape)
    dtype = dtype_of(node.meta["val"].dtype)
    operands = [_short(lowering, x, cost) if isinstance(x, Value) else x for x in operands]
    given = [broadcast(lowering, x, shape) if isinstance(x, Value) else x for x in operands]
    vector = simd if isinstance(simd, bool) else simd(meet)

    def applied(given: Sequence[Any], shape: Sequence[Any]) -> Value:
        values = [x for x in given if isinstance(x, Value)]

        def at(index: Sequence[Any]) -> Any:
            result = function(meet, *(_scalar(x, index, meet) for x in given), **options)
            # Expressions are trees, and would repeat what is long wherever it is read.
            result = bind(result) if cost > 1 else result
            return cast(result, "bool" if str(result.ty) == "bool" else meet, dtype)

        total = cost + sum(v.cost for v in values)
        return Value(tuple(shape), dtype, at, cost=total, simd=vector and all(v.simd for v in values))

    found = applied(given, shape)
    deep = next(
        (x.blocks for x in operands if isinstance(x, Value) and _lies_in_blocks(x, shape, node)), None
    )
    if deep is None:
        return found
    inside = [_in_blocks(lowering, x, deep.shape, shape) if isinstance(x, Value) else x for x in operands]
    return replace(found, blocks=applied(inside, deep.shape))


def _lies_in_blocks(x: Value, shape: Sequence[Any], node: fx.Node) -> bool:
    """Whether an operation on it may be one on its blocks: where lanes are no channels, they have to stay finite."""
    if x.blocks is None or x.shape != tuple(shape):
        return False
    return x.shape[1] % x.blocks.shape[-1] == 0 or node.target in _FINITE


def _in_blocks(lowering: Lowering, x: Value, deep: Sequence[Any], shape: Sequence[Any]) -> Value:
    """See an operand with its channels in blocks, and repeat it to a shape."""
    if x.blocks is not None and x.blocks.shape[-1] == deep[-1] and x.blocks.shape[1] == deep[1]:
        return broadcast(lowering, x.blocks, deep)
    size, channels = deep[-1], shape[1]
    whole = broadcast(lowering, x, shape)

    def at(i: Sequence[Any]) -> Any:
        channel = i[1] * size + i[4]
        if channels % size:
            channel = tirx.min(channel, const(channels - 1, "int64"))
        return whole.at([i[0], channel, i[2], i[3]])

    return whole.view(deep, at)


def _scalar(x: Any, index: Sequence[Any], meet: str) -> Any:
    if isinstance(x, Value):
        return cast(x.at(index), x.dtype, meet)
    if isinstance(x, bool | int | float):
        return const(x, meet)
    return x if x is None or isinstance(x, str) else tirx.Cast(meet, x)


def _short(lowering: Lowering, x: Value, cost: int) -> Value:
    # TVM's simplifier puts what is bound into what reads it: functions of functions would take it minutes.
    return lowering.ready(x) if cost >= LONG and x.cost >= LONG else x


def _seen(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        value = arg.meta["val"]
        return {torch.SymInt: 1, torch.SymFloat: 1.0}.get(type(value), value)
    return arg if isinstance(arg, bool | int | float) else None

"""The `specqd::` operators in ONNX's: functions of values that torch's exporter calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from onnxscript.values import Op, Opset

import specqd.ops  # noqa: F401  (registers the operators)
from specqd.errors import ContractError
from specqd.program import Entry, Program

__all__ = ["DOMAIN", "TRANSLATIONS", "demand_translatable"]

DOMAIN = "specqd"
"""The domain of weights that are still to get ONNX's own types: specqd.frontends.onnx.compression."""

_Parameter = onnx.defs.OpSchema.FormalParameter
_mxfp4 = Op(
    Opset(DOMAIN, 1),
    "mxfp4",
    onnx.defs.OpSchema(
        "mxfp4",
        DOMAIN,
        1,
        inputs=[_Parameter("blocks", "tensor(uint8)"), _Parameter("scales", "tensor(uint8)")],
        outputs=[_Parameter("weight", "tensor(float)")],
    ),
)
_WHY_NOT = {
    "cached_attention": "a cache, which ONNX models do not hold; export before insert-kv-cache",
    "linear_refined": "a head that is computed in two steps; export before refine-head",
    "among_all": "a trimmed vocabulary; export before trim-vocabulary",
}


def demand_translatable(program: Program, entry: Entry) -> None:
    """Raise ContractError for what has no translation, with what to do."""
    for node in entry.graph.nodes:
        namespace, _, name = str(node.target).partition(".")
        known = name.removesuffix(".default")
        if node.op == "call_function" and namespace == "specqd" and known in _WHY_NOT:
            raise ContractError(f"{entry.name} holds {node.name}: {_WHY_NOT[known]}")
        if node.target is torch.ops.specqd.causal_attention.default and node.args[7] is not None:
            raise ContractError(
                f"{entry.name} holds {node.name} with attention sinks, which ONNX's Attention lacks"
            )


def _attention(
    q: Any, k: Any, v: Any, scale: float, layer: int, window: int, softcap: float, sinks: Any
) -> Any:
    """`Attention` on `[B, heads, S, D]`, of which fewer may be heads of keys; a window is a mask."""
    mask = _window(q, window) if window else None
    mixed, *_ = op.Attention(q, k, v, mask, is_causal=1, scale=scale, softcap=softcap)
    return op.Transpose(mixed, perm=[0, 2, 1, 3])


def _window(q: Any, window: int) -> Any:
    """Whether each of S positions sees each of S: those less than `window` before."""
    count = op.Squeeze(op.Shape(q, start=2, end=3), op.Constant(value_ints=[0]))
    at = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    rows = op.Unsqueeze(at, op.Constant(value_ints=[1]))
    return op.Less(op.Sub(rows, at), op.Constant(value_int=window))


def _rms_norm(x: Any, weight: Any, eps: float, offset: float) -> Any:
    if weight is None:
        mean = op.ReduceMean(op.Mul(x, x), op.Constant(value_ints=[-1]))
        return op.Div(x, op.Sqrt(op.Add(mean, op.Constant(value_float=eps))))
    scale = op.Add(weight, op.Constant(value_float=offset)) if offset else weight
    return op.RMSNormalization(x, scale, axis=-1, epsilon=eps)


def _rope(x: Any, cos: Any, sin: Any) -> Any:
    """Turn the first channels, as many as there are angles for; the rest passes."""
    axis, zero = op.Constant(value_ints=[3]), op.Constant(value_ints=[0])
    turned, whole = cos.shape[-1], x.shape[-1]
    middle, end = op.Constant(value_ints=[turned // 2]), op.Constant(value_ints=[turned])
    first, second = op.Slice(x, zero, middle, axis), op.Slice(x, middle, end, axis)
    heads = op.Constant(value_ints=[1])
    part = x if turned == whole else op.Slice(x, zero, end, axis)
    found = op.Add(
        op.Mul(part, op.Unsqueeze(cos, heads)),
        op.Mul(op.Concat(op.Neg(second), first, axis=3), op.Unsqueeze(sin, heads)),
    )
    if turned == whole:
        return found
    return op.Concat(found, op.Slice(x, end, op.Constant(value_ints=[whole]), axis), axis=3)


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _linear_mxfp4(x: Any, blocks: Any, scales: Any, bias: Any) -> Any:
    return _linear(x, _mxfp4(blocks, scales), bias)


def _linear_int8(x: Any, values: Any, scales: Any, bias: Any) -> Any:
    return _linear(x, op.DequantizeLinear(values, scales, axis=0), bias)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.specqd.causal_attention.default: _attention,
    torch.ops.specqd.rms_norm.default: _rms_norm,
    torch.ops.specqd.rope.default: _rope,
    torch.ops.specqd.linear_mxfp4.default: _linear_mxfp4,
    torch.ops.specqd.linear_int8.default: _linear_int8,
}
"""Operator -> function of its arguments that makes nodes."""

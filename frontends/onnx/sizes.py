"""Operators on sizes that are left open: the arithmetic by which models find shapes, on symbols."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import sympy
import torch
from onnx import TensorProto
from torch.fx.experimental.symbolic_shapes import statically_known_true

from specqd.errors import CaptureError

from .graph import Node
from .values import known, sizes

__all__ = ["SIZES"]

Value = Any


def is_symbolic(value: Any) -> bool:
    return value is not None and value.dtype == object


def _listed(value: np.ndarray) -> list[Any]:
    return np.atleast_1d(value).tolist()


def _array(value: np.ndarray) -> np.ndarray:
    return value.astype(object)


def _pairwise(function: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    def rounded(a: Any, b: Any) -> Any:
        found = function(a, b)
        return float(np.float32(found)) if isinstance(found, float) else found

    def apply(node: Node, a: Value, b: Value, fmod: int = 0) -> Value:
        return NotImplemented if fmod else _made(np.frompyfunc(rounded, 2, 1)(_array(a), _array(b)))

    return apply


def _whole(function: Callable[[Any], Any]) -> Callable[..., Value]:
    def apply(node: Node, x: Value) -> Value:
        for one in x.flat:
            _demand_exact(node, one)
        return _made(np.frompyfunc(function, 1, 1)(x))

    return apply


def _demand_exact(node: Node, value: Any) -> None:
    """Refuse to make a whole number of what float32 rounds: it may be the next one, and symbols are not rounded."""
    if isinstance(value, torch.SymFloat):
        by = next((float(f) for f in value.node.expr.atoms(sympy.Float) if float(f) * 256 % 1), None)
        if by is not None:
            raise CaptureError(
                f"{node}: it rounds a size that is left open, scaled by {by:g}, which is not exact in float32; "
                "fix the size, as dynamic_shapes={'name': 8}"
            )


def _divided(a: Any, b: Any) -> Any:
    """Divide; whole numbers towards zero, without a condition on sizes that are left open."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    if not statically_known_true(b >= 0):
        a, b = a * torch.sym_max(torch.sym_min(b, 1), -1), torch.sym_max(b, -b)
    if statically_known_true(a >= 0):
        return a // b
    return torch.sym_max(a, 0) // b - torch.sym_max(-a, 0) // b


def _gather(node: Node, x: Value, index: Value, axis: int = 0) -> Value:
    return NotImplemented if is_symbolic(index) else _made(np.take(x, index, axis))


def _slice(
    node: Node, x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None
) -> Value:
    if any(is_symbolic(v) for v in (starts, ends, axes, steps)) or not is_symbolic(x):
        return NotImplemented
    along = range(len(starts)) if axes is None else _listed(axes)
    by = [1] * len(starts) if steps is None else _listed(steps)
    index = [slice(None)] * x.ndim
    for a, start, end, step in zip(along, _listed(starts), _listed(ends), by, strict=True):
        index[a] = slice(start, None if step < 0 and end < -x.shape[a] else end, step)
    return sizes(x[tuple(index)])


def _made(found: Any) -> Value:
    """Return an array, or the one number that numpy makes of an array without dimensions."""
    return sizes(found if isinstance(found, np.ndarray) else np.array(found, dtype=object))


def _squeeze(node: Node, x: Value, axes: Value = None) -> Value:
    return _made(np.squeeze(x, None if axes is None else tuple(_listed(axes))))


def _unsqueeze(node: Node, x: Value, axes: Value) -> Value:
    return _made(np.expand_dims(x, tuple(_listed(axes))))


def _concat(node: Node, *parts: Value, axis: int) -> Value:
    return sizes(np.concatenate([_array(part) for part in parts], axis))


def _cast(node: Node, x: Value, to: int, **_: Any) -> Value:
    if to in (TensorProto.INT64, TensorProto.INT32):
        return _whole(torch.sym_int)(node, x)
    if to in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return _made(np.frompyfunc(torch.sym_float, 1, 1)(x))
    return NotImplemented


def _reduced(function: Callable[[Any], Any]) -> Callable[..., Value]:
    def apply(
        node: Node, x: Value, axes: Value = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Value:
        if x.ndim > 1 or not is_symbolic(x):
            return NotImplemented
        if noop_with_empty_axes and (axes is None or not axes.size):
            return sizes(x)
        found = function(list(x.flat))
        return _made(np.array([found], dtype=object)) if keepdims and x.ndim else _made(found)

    return apply


def _reshape(node: Node, x: Value, shape: Value, **_: Any) -> Value:
    return NotImplemented if is_symbolic(shape) else _made(np.reshape(x, _listed(shape)))


def _where(node: Node, condition: Value, a: Value, b: Value) -> Value:
    if is_symbolic(condition):
        return NotImplemented
    return sizes(np.where(condition, _array(a), _array(b)))


def _equal(node: Node, a: Value, b: Value) -> Value:
    found = np.frompyfunc(lambda x, y: bool(x == y), 2, 1)(_array(a), _array(b))
    return known(np.asarray(found, dtype=bool).tolist(), torch.bool)


SIZES: dict[str, Callable[..., Value]] = {
    "Add": _pairwise(operator.add),
    "Sub": _pairwise(operator.sub),
    "Mul": _pairwise(operator.mul),
    "Div": _pairwise(_divided),
    "Mod": _pairwise(operator.mod),
    "Max": _pairwise(torch.sym_max),
    "Min": _pairwise(torch.sym_min),
    "Neg": lambda node, x: _made(-x),
    "Floor": _whole(math.floor),
    "Ceil": _whole(math.ceil),
    "Equal": _equal,
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Cast": _cast,
    "Identity": lambda node, x: x,
    "Reshape": _reshape,
    "ReduceProd": _reduced(math.prod),
    "ReduceSum": _reduced(sum),
}
"""`function(node, *inputs, **attributes)` on arrays, of objects where they hold symbols.

NotImplemented leaves a node to the rule on tensors.
"""

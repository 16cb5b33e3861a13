"""Conversions between types of elements."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from specqd.errors import CaptureError
from specqd.frontends.onnx.coded import CODES, Coded, decode, encode, is_coded, is_wide
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.tensors import dtype_of, name_of

__all__: list[str] = []

_SIGNED = {
    TensorProto.UINT16: TensorProto.INT16,
    TensorProto.UINT32: TensorProto.INT32,
    TensorProto.UINT64: TensorProto.INT64,
}


@rule("Cast", coded=True)
def _cast(node: Node, x: Any, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    return _converted(node, x, to, saturate, round_mode)


@rule("CastLike", coded=True)
def _cast_like(node: Node, x: Any, like: Any, *, saturate: int = 1, round_mode: str = "up") -> Any:
    return _converted(node, x, node.types[1], saturate, round_mode)


def _converted(node: Node, x: Any, to: int, saturate: int, mode: str) -> Any:
    if isinstance(x, Coded):
        if x.type == to:
            return x
        if not is_coded(to):
            return decode(x, dtype_of(to, node))
        x = x.codes if x.codes.dtype == torch.int64 else decode(x)  # float32 does not hold 32 bits
    return encode(x, to, saturate=bool(saturate), mode=mode) if is_coded(to) else x.to(dtype_of(to, node))


@rule("BitCast", coded=True)
def _bit_cast(node: Node, x: Any, *, to: int) -> Any:
    kind = node.types[0]
    if is_wide(kind) or is_wide(to):
        wide, other = (kind, to) if is_wide(kind) else (to, kind)
        if _SIGNED.get(wide) != other:
            raise CaptureError(f"{node}: bits of {name_of(kind)} are not taken for {name_of(to)}")
        return encode(x, to) if is_wide(to) else x.codes.to(dtype_of(to, node))
    if is_coded(to) or isinstance(x, Coded):
        codes = x.codes if isinstance(x, Coded) else x
        if codes.element_size() != 1 or (is_coded(to) and to in (TensorProto.INT4, TensorProto.UINT4)):
            raise CaptureError(f"{node}: bits of {name_of(kind)} are not taken for {name_of(to)}")
        target = CODES.get(to) or dtype_of(to, node)
        same = codes if codes.dtype == target else codes.view(target)
        return Coded(same, to) if is_coded(to) else same
    target = dtype_of(to, node)
    if target.itemsize != x.element_size():
        raise CaptureError(
            f"{node}: {name_of(node.types[0])} and {name_of(to)} are not as wide as each other"
        )
    return x.view(target)


@rule("Binarizer", domain="ai.onnx.ml")
def _binarizer(node: Node, x: Tensor, *, threshold: float = 0.0) -> Tensor:
    return (x > threshold).to(x.dtype)


@rule("ArrayFeatureExtractor", domain="ai.onnx.ml")
def _features(node: Node, x: Tensor, places: Tensor) -> Tensor:
    return x.index_select(-1, places.reshape(-1).long())

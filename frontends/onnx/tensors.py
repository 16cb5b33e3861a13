"""Tensors of ONNX files as tensors of torch, from the file itself or from files beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from specqd.errors import CaptureError, InputError

from .coded import CODES, Coded, is_coded, is_wide

__all__ = ["DTYPES", "dtype_of", "name_of", "tensor_of"]

DTYPES = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float16,
    TensorProto.BOOL: torch.bool, TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16, TensorProto.INT32: torch.int32, TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
}  # fmt: skip
"""What torch computes in, by ONNX's numbers of types."""
_PER_BYTE = {
    TensorProto.INT4: 2, TensorProto.UINT4: 2, TensorProto.FLOAT4E2M1: 2, TensorProto.INT2: 4, TensorProto.UINT2: 4,
}  # fmt: skip
_MOST = 1 << 40


def name_of(kind: int) -> str:
    """ONNX's name of a type of elements, such as FLOAT16."""
    return TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else f"number {kind}"


def dtype_of(kind: int, where: object) -> torch.dtype:
    """Return torch's dtype of an ONNX type that torch computes in; raises CaptureError for others."""
    if kind not in DTYPES:
        raise CaptureError(f"{where} is of type {name_of(kind)}, which is not compiled; use a numeric type")
    return DTYPES[kind]


def tensor_of(proto: TensorProto, folder: Path | None, where: str = "") -> Tensor | Coded:
    """Return a tensor; `folder` is that of the model's file, from which it may name another.

    Raises:
        InputError: it is not as large as it says, or its data cannot be found.
        CaptureError: its type cannot be held.
    """
    where = where or f"the tensor {proto.name!r}"
    kind, shape = proto.data_type, tuple(proto.dims)
    if kind not in CODES:
        dtype_of(kind, where)
    if any(size < 0 for size in shape) or math.prod(shape) > _MOST:
        raise InputError(f"{where} has the impossible shape {list(shape)}; export the model again")
    if proto.HasField("segment"):
        raise InputError(
            f"{where} is a segment of a tensor, which ONNX does not define; export the model again"
        )
    if proto.data_location == TensorProto.EXTERNAL:
        array = _outside(proto, folder, where)
    else:
        _demand_whole(proto, where)
        array = numpy_helper.to_array(proto)
    array = np.array(array.reshape(shape), order="C")  # to write into, and in the machine's order
    if is_wide(kind):
        if kind == TensorProto.UINT64 and array.size and array.max() >> 63:
            raise CaptureError(f"{where} holds numbers beyond 2**63, which are not compiled")
        return Coded(torch.from_numpy(array.astype(str(CODES[kind]).removeprefix("torch."))), kind)
    if is_coded(kind):
        integer = array.dtype.name in ("int4", "uint4", "int2", "uint2")
        held = torch.from_numpy(array.astype(np.int8 if array.dtype.name[0] == "i" else np.uint8) if integer
                                else array.view(np.uint8))  # fmt: skip
        return Coded(held, kind)
    return torch.from_numpy(array)


def _bytes(kind: int, count: int) -> int:
    per_byte = _PER_BYTE.get(kind)
    return -(-count // per_byte) if per_byte else count * helper.tensor_dtype_to_np_dtype(kind).itemsize


def _demand_whole(proto: TensorProto, where: str) -> None:
    """Check that there are as many elements as the shape says, before there is memory for them."""
    count = math.prod(proto.dims)
    if proto.HasField("raw_data"):
        got, wanted = len(proto.raw_data), _bytes(proto.data_type, count)
        if got != wanted:
            raise InputError(
                f"{where} says {list(proto.dims)}, {wanted} bytes, and holds {got}; the file is damaged"
            )
        return
    held = len(getattr(proto, helper.tensor_dtype_to_field(proto.data_type)))
    if held != (_bytes(proto.data_type, count) if proto.data_type in _PER_BYTE else count):
        raise InputError(f"{where} says {list(proto.dims)} and holds {held} elements; the file is damaged")


def _outside(proto: TensorProto, folder: Path | None, where: str) -> np.ndarray:
    told = {entry.key: entry.value for entry in proto.external_data}
    location = told.get("location", "")
    if folder is None:
        raise InputError(
            f"{where} lies in the file {location!r} beside the model; give the model's path instead"
        )
    home = folder.resolve()
    try:
        path = (home / location).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} lies in {location[:99]!r}, which is no path: {error}") from error
    if not location or Path(location).is_absolute() or not path.is_relative_to(home) or path == home:
        raise InputError(f"{where} lies in {location!r}, outside of the model's folder; this is not read")
    if not there:
        raise InputError(f"{where} lies in {location!r}, which is not in {folder}; put it beside the model")
    wanted = _bytes(proto.data_type, math.prod(proto.dims))
    try:
        offset, length = int(told.get("offset") or 0), int(told.get("length") or wanted)
    except ValueError as error:
        raise InputError(
            f"{where} lies at a place that is no number: {error}; the file is damaged"
        ) from error
    if length != wanted or offset < 0 or offset + wanted > path.stat().st_size:
        raise InputError(
            f"{where} takes {wanted} bytes, and {location!r} has none such at {offset}; it is cut off or another's"
        )
    with path.open("rb") as file:
        file.seek(offset)
        whole = TensorProto(name=proto.name, data_type=proto.data_type, dims=proto.dims)
        whole.raw_data = file.read(wanted)
    return numpy_helper.to_array(whole)

"""Packed weights on disk: safetensors with every tensor at a multiple of 64 bytes, read by memory map."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from specqd.errors import ArtifactError

__all__ = ["ALIGNMENT", "read_weights", "write_weights"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector load that compiled code makes."""

# safetensors allows no gaps between tensors, so what fills them is a tensor with a name no weight has.
_FILLER = "\x00fill"
_DTYPES = {
    "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "F16": "float16", "BOOL": "bool",
}  # fmt: skip
_CODES = {name: code for code, name in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library, in bytes
_CHUNK = 64 * 2**20
# Bytes a header entry and its filler's take at most beside the names; shapes have few dimensions.
_ENTRY = 512


def write_weights(
    path: Path, weights: Mapping[str, np.ndarray], progress: Callable[[int], None] | None = None
) -> None:
    """Write arrays of integers, float16 to float64 or bool in the given order; `progress` is told bytes written.

    Each array is asked for once and let go once written, so a mapping may make them as they are asked for.

    Raises:
        ArtifactError: an array has another dtype.
        OSError: the disk is full or the path cannot be written.
    """
    header: dict[str, Any] = {}
    # Only the arrays tell the header's entries, and it comes before them: leave ample room for it.
    base = _rounded(8 + sum(2 * len(json.dumps(name)) + _ENTRY for name in weights) + _ENTRY)
    offset = 0
    with path.open("wb") as file:
        file.seek(base)
        for name in weights:
            array = np.asarray(weights[name], order="C")
            if array.dtype.name not in _CODES:
                raise ArtifactError(
                    f"weight {name!r} is {array.dtype}: a weight file holds {', '.join(_CODES)}"
                )
            fill = np.zeros(_rounded(array.nbytes) - array.nbytes, np.uint8)
            for key, part in ((name, array), (f"{_FILLER}{len(header)}", fill)):
                if part.size or key == name:
                    span = [offset, offset + part.nbytes]
                    header[key] = {
                        "dtype": _CODES[part.dtype.name],
                        "shape": part.shape,
                        "data_offsets": span,
                    }
                    _write(file, part, progress)
                    offset = span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        file.seek(0)
        file.write((base - 8).to_bytes(8, "little") + text.ljust(base - 8))


def _write(file: BinaryIO, array: np.ndarray, progress: Callable[[int], None] | None) -> None:
    # Written in pieces so that a progress bar moves within one large matrix.
    flat = array.reshape(-1).view(np.uint8)
    for begin in range(0, flat.nbytes, _CHUNK):
        written = file.write(flat[begin : begin + _CHUNK].data)
        if progress:
            progress(written)


def _rounded(size: int) -> int:
    return size + -size % ALIGNMENT


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Map the file and return its tensors as arrays over the map: nothing is read until it is used.

    The map is private and copy-on-write, so that DLPack finds it writable; it lives as long as any array.

    Raises:
        ArtifactError: the file is missing, cut off or not a weight file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ArtifactError(f"{path} is cut off or not a weight file: build the artifact again")
            header = _parse(path, file.read(length))
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    return {
        name: _array(path, view, name, entry, 8 + length)
        for name, entry in header.items()
        if not name.startswith(_FILLER) and name != "__metadata__"
    }


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"the header of {path} is not readable: build the artifact again") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"the header of {path} is not a table of tensors: build the artifact again")
    return header


def _array(path: Path, view: mmap.mmap, name: str, entry: Any, base: int) -> np.ndarray:
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        begin, end = (base + int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(size) for size in entry["shape"])
        count = math.prod(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} describes {name!r} badly: build the artifact again") from error
    inside = base <= begin <= end <= len(view) and min(shape, default=0) >= 0
    if not inside or end - begin != count * dtype.itemsize:
        raise ArtifactError(f"{path} is cut off or damaged at tensor {name!r}: build the artifact again")
    return np.frombuffer(view, dtype, count, begin).reshape(shape)

"""Weights of each precision as vectors of integers, in which zeros are zero, and their arrays in a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .formats import CHANNELS, Format, Stored

__all__ = ["PARTS", "PRECISIONS", "Precision", "part"]

Part = Literal["values", "masks", "starts"]
PARTS: tuple[Part, ...] = ("values", "masks", "starts")


@dataclass(frozen=True)
class Precision:
    """How a kind of weight lies in vectors: `inputs` a channel, numbers of `bits`, maybe `paired` codes of four."""

    inputs: int
    bits: int
    paired: bool = False

    @property
    def dense_bytes(self) -> int:
        """Bytes of a vector in the dense layout."""
        return CHANNELS * self.inputs * self.bits // (16 if self.paired else 8)

    def elements(self, weight: Tensor) -> Tensor:
        """Return a stored weight as integers [N, K], K a multiple of 32 if they are bytes; -0 is 0."""
        if self.paired:
            codes = torch.stack([weight & 15, weight >> 4], -1).flatten(-2)
            return codes.masked_fill(codes == 8, 0).view(torch.int8)
        if self.bits == 8:
            return torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32))
        bits = weight.contiguous().view(torch.int16) if self.bits == 16 else weight.float().view(torch.int32)
        return bits.masked_fill(weight == 0, 0)

    def vectors(self, weight: Tensor) -> np.ndarray:
        """Return a stored weight as vectors [blocks, vectors, 16, inputs], channels padded to whole blocks."""
        elements = self.elements(weight)
        padded = torch.nn.functional.pad(elements, (0, 0, 0, -len(elements) % CHANNELS))
        return (
            padded.numpy().reshape(len(padded) // CHANNELS, CHANNELS, -1, self.inputs).transpose(0, 2, 1, 3)
        )


PRECISIONS = {
    "f32": Precision(1, 32),
    "bf16": Precision(2, 16),
    "int8": Precision(4, 8),
    "mxfp4": Precision(4, 8, paired=True),
}
"""By the name of the dense form of codegen/pack.py."""


def part(form: str, weight: Tensor, size: int) -> np.ndarray:
    """Return one array of a weight in the form `PRECISION-FORMAT-PART`, filled up with zeros to `size` elements."""
    kind, format_name, name = form.split("-")
    precision = PRECISIONS[kind]
    stored = Stored(precision.vectors(weight), Format(format_name), precision.paired)  # type: ignore[arg-type]
    array: np.ndarray = getattr(stored, name).reshape(-1)
    return np.concatenate([array, np.zeros(size - array.size, array.dtype)]) if array.size < size else array

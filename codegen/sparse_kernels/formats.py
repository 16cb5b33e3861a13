"""Formats of matrices with zeros: bits that say which elements are there, and the elements without their gaps.

A matrix lies as its dense kernel reads it, in vectors of 64 bytes that hold 16 output channels times some inputs. A
format says what one bit stands for, so that the mask of a vector is as short as the zeros allow; what is read is the
very vector of the dense layout, so no format changes a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

__all__ = ["CHANNELS", "FORMATS", "PADDING", "VECTOR", "Format", "Stored"]

#: output channels of a vector, and its bytes
CHANNELS, VECTOR = 16, 64
#: elements that may be read beyond the last one
PADDING = 64


@dataclass(frozen=True)
class Format:
    """What one bit of a mask stands for.

    `element` bits stand for an element each, wherever zeros are, N of M too; `lane` bits for the inputs of one channel
    in a vector, a block of 1 x 4 in INT8; `column` bits for one input of all channels, a block of 16 x 1.
    """

    name: Literal["element", "lane", "column"]

    def mask_bytes(self, inputs: int) -> int:
        """Return the bytes of the mask of one vector of so many inputs."""
        return {"element": 2 * inputs, "lane": 2, "column": 1}[self.name]

    def kept(self, vectors: np.ndarray) -> np.ndarray:
        """Say which units of vectors [..., 16, inputs] are not all zero: bool [..., units], in their order."""
        some = vectors != 0
        if self.name == "element":
            return some.reshape(*some.shape[:-2], -1)
        return some.any(-1 if self.name == "lane" else -2)

    def spread(self, kept: np.ndarray, inputs: int) -> np.ndarray:
        """Give each element what its unit has: bool [..., 16 * inputs]."""
        if self.name == "element":
            return kept
        return np.repeat(kept, inputs, -1) if self.name == "lane" else np.tile(kept, CHANNELS)


FORMATS = (Format("element"), Format("lane"), Format("column"))


@dataclass(frozen=True)
class Stored:
    """Vectors [blocks, vectors, 16, inputs] of integers in a format; each array is made when it is asked for.

    `paired`: the elements are codes of four bits, of which two vectors share bytes, the first the low halves; a pair
    takes as many bytes as the fuller of its vectors has elements.
    """

    vectors: np.ndarray
    form: Format
    paired: bool = False

    @cached_property
    def masks(self) -> np.ndarray:
        """One unsigned number for each vector, the first unit in its lowest bit."""
        packed = np.packbits(self.form.kept(self.vectors), -1, bitorder="little")
        return packed.view(f"<u{packed.shape[-1]}")[..., 0]

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the values of each block begin, int32."""
        sizes = self._sizes.sum(1)
        return (sizes.cumsum() - sizes).astype(np.int32)

    @cached_property
    def values(self) -> np.ndarray:
        """The elements that are there, block after block of 16 channels, and `PADDING` zeros."""
        there = self._there
        flat = self.vectors.reshape(there.shape)
        values = np.zeros(self.size, flat.dtype)
        if not self.paired:
            values[:-PADDING] = flat[there]
            return values
        begins = (self._sizes.reshape(-1).cumsum() - self._sizes.reshape(-1)).reshape(self._sizes.shape)
        for half in (0, 1):
            mine = there[:, half::2]
            places = np.repeat(begins, mine.sum(-1).reshape(-1)) + mine.cumsum(-1, dtype=np.uint8)[mine] - 1
            values[places] |= flat[:, half::2][mine] << 4 * half
        return values

    @property
    def size(self) -> int:
        """The number of values."""
        return int(self._sizes.sum()) + PADDING

    @cached_property
    def _there(self) -> np.ndarray:
        """Which elements are there: bool [blocks, vectors, 16 * inputs]."""
        return self.form.spread(self.form.kept(self.vectors), self.vectors.shape[-1])

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Values that each vector takes [blocks, vectors], or each pair [blocks, vectors / 2]."""
        sizes = self._there.sum(-1, dtype=np.int64)
        return sizes.reshape(len(sizes), -1, 2).max(-1) if self.paired else sizes

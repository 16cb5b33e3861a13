"""What a product multiplies: where its inputs and its weights lie, and as which types they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specqd.codegen.dense_kernels.spec import RANGE

__all__ = ["Inputs", "Operands", "sum_type", "view_type", "weight_view"]


@dataclass(frozen=True)
class Inputs:
    """Where words of inputs lie in a flat buffer: how far it is from one to the next of each kind."""

    buffer: Any
    block: int
    word: int
    row: int
    column: int
    tap_row: int = 0
    tap_column: int = 0


@dataclass(frozen=True)
class Operands:
    """What a product multiplies.

    Attributes:
        weight: flat, as `weight_view` says, in blocks of 16 output channels.
        words: of inputs of an output channel; `size` of a block, the last may hold fewer.
    """

    dtype: str
    inputs: Inputs
    weight: Any
    taps: tuple[int, int]
    words: int
    size: int

    @property
    def full(self) -> int:
        """Whole blocks of inputs."""
        return self.words // self.size

    @property
    def tail(self) -> int:
        """Words of a last block that is not whole."""
        return self.words % self.size

    @property
    def lines(self) -> int:
        """Cache lines of weights that a word of all taps has, in a block of output channels."""
        return self.taps[0] * self.taps[1]


def view_type(dtype: str) -> str:
    """Return the type as which words of inputs are read."""
    return "float32" if dtype == "float32" else "int32"


def sum_type(dtype: str) -> str:
    """Return the type of sums."""
    return "int32" if dtype in RANGE else "float32"


def weight_view(dtype: str) -> tuple[str, str]:
    """Return the type of a packed weight, and as which it is read."""
    return {"float32": ("float32", "float32"), "bfloat16": ("bfloat16", "int32")}.get(dtype, ("int8", "int8"))

"""What flows between the nodes of an ONNX graph while it is captured.

A value is a traced tensor, a tensor that is known (a plain torch.Tensor), a Coded one, sizes, or None for what a node
leaves out. Sizes are an array of objects: the numbers of a shape computation, some of which are symbols.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from specqd.errors import CaptureError

from .coded import Coded, decode, is_wide

__all__ = [
    "Value", "is_known", "is_symbolic", "kind_of", "known", "numbers", "plain", "single", "sizes", "tensor",
]  # fmt: skip

Value = Any


def is_known(value: Value) -> bool:
    """Whether a value does not depend on the model's inputs, not even on their sizes."""
    held = value.codes if isinstance(value, Coded) else value
    return held is None or type(held) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_symbolic(value: Value) -> bool:
    """Whether a value is sizes with symbols."""
    return isinstance(value, np.ndarray)


def known(numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers as a tensor that is known, also while a graph is traced."""
    with _disable_current_modes():
        return torch.tensor(numbers, dtype=dtype)


def sizes(numbers: Iterable[Any] | np.ndarray) -> Value:
    """Return sizes: a known tensor where all are numbers."""
    array = numbers if isinstance(numbers, np.ndarray) else _array(list(numbers))
    if all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in array.flat):
        return known(array.astype(np.int64).tolist())
    return array


def _array(numbers: list[Any]) -> np.ndarray:
    array = np.empty(len(numbers), dtype=object)
    array[:] = numbers
    return array


def single(value: Any) -> Any:
    """Return the number that is given as itself or as a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def kind_of(sizes: np.ndarray) -> torch.dtype:
    """The dtype that sizes have as a tensor."""
    real = any(isinstance(one, torch.SymFloat | float) for one in sizes.flat)
    return torch.float32 if real else torch.int64


def tensor(value: Value, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a value as a tensor; codes as what they stand for."""
    if isinstance(value, Coded):
        return value.codes if is_wide(value.type) else decode(value, dtype)
    if not is_symbolic(value):
        return value
    parts = [torch.full((), one, dtype=kind_of(value)) for one in value.flat]
    return torch.stack(parts).reshape(value.shape) if value.ndim else parts[0]


def numbers(value: Tensor) -> Any:
    """Return what a known tensor holds, as a number or lists of them, also while a graph is traced."""
    with _disable_current_modes():
        return value.tolist()


def plain(value: Value, where: str) -> Any:
    """Return a value as a number or a list of numbers; raises CaptureError for what depends on the inputs' data."""
    if value is None:
        return None
    if is_symbolic(value):
        return value.tolist()
    value = value.codes if isinstance(value, Coded) and is_wide(value.type) else value
    if not is_known(value) or isinstance(value, Coded):
        raise CaptureError(
            f"{where} decides the shape or course of what is computed, and depends on the data; it has to be known. "
            "Give the input that it comes from as a list of numbers in example_inputs"
        )
    return numbers(value)

"""Functions of tensors, compiled and compared with eager torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import specqd

__all__ = ["assert_as_eager"]

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class _Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def assert_as_eager(folder: Path, function: Callable[..., Any], *inputs: Tensor) -> None:
    """Compile a function for these inputs, into this folder, and demand what eager torch gives."""
    specqd.compile(_Apply(function), folder / "artifact", example_inputs=inputs)
    got = specqd.load(folder / "artifact")(*inputs)
    wanted = function(*inputs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for a, b in zip(got if isinstance(got, tuple) else (got,), wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **TOLERANCE)

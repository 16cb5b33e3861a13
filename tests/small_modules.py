"""Programs of modules that are functions with some weights, for tests of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import specqd
from specqd.program import Program

__all__ = ["calls", "of"]


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, *given: Tensor) -> Any:
        return self.function(self, *given)


def of(function: Callable[..., Any], *given: Tensor, dynamic: Any = None, **weights: Tensor) -> Program:
    """Capture `function(module, *given)`; the module holds the weights."""
    shapes = None if dynamic is None else (dynamic,)
    return specqd.capture(_Function(function, weights), given, shapes)


def calls(program: Program) -> list[str]:
    """The operators of the target, in order, without sizes."""
    nodes = [n for n in program.target.graph.nodes if n.op == "call_function"]
    names = [str(getattr(n.target, "overloadpacket", n.target.__name__)) for n in nodes]
    return [name.removeprefix("aten.") for name in names if "sym_size" not in name]

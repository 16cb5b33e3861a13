"""Run an entry in eager torch, float32: the slow oracle that compiled code is checked against."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import specqd.ops  # noqa: F401  (registers the operators graphs hold)
from specqd.cache_formats import tensor_dtype
from specqd.program import Entry, Program

__all__ = ["Interpreter", "inputs", "new_caches", "propagate", "run"]


class Interpreter(fx.Interpreter):
    """Runs an entry's graph on tensors given as `inputs` orders them; weights of any float dtype act as float32."""

    def __init__(self, program: Program, entry: Entry) -> None:
        super().__init__(torch.nn.Module(), graph=entry.graph)
        self.weights = program.weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Give the weight as the graph sees it."""
        weight = self.weights[target]
        return weight.float() if weight.is_floating_point() else weight


class _ShapeInterpreter(Interpreter):
    def __init__(self, program: Program, entry: Entry, mode: Any) -> None:
        super().__init__(program, entry)
        self.mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        weight = self.weights[target]
        dtype = torch.float32 if weight.is_floating_point() else weight.dtype
        with self.mode:
            return torch.empty(weight.shape, dtype=dtype)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


def new_caches(program: Program) -> dict[str, torch.Tensor]:
    """Make zeroed cache tensors for every placeholder the program's caches declare, and what an observer says of them.

    A quantised cache is a float32 one of what reading it gives: specqd::cached_attention rounds what it writes.
    """
    caches = {}
    for c in program.caches.values():
        parts = (("k", c.key_dim, c.key_dtype), ("v", c.value_dim, c.value_dtype))
        for part, channels, dtype in parts:
            shape = c.layers, c.kv_heads, c.capacity, channels
            caches[f"{c.name}_{part}"] = torch.zeros(shape, dtype=tensor_dtype(dtype))
        caches[f"{c.name}_received"] = torch.zeros(c.layers, c.kv_heads, c.capacity)
    return caches


def inputs(entry: Entry, tokens: Any, positions: Any, caches: dict[str, Any]) -> list[Any]:
    """Put what an entry takes into the order of its placeholders."""
    given = {"tokens": tokens, "positions": positions, "emphasis": torch.ones(tokens.shape[1]), **caches}
    return [given[str(n.target)] for n in entry.graph.nodes if n.op == "placeholder"]


def run(
    program: Program,
    entry: Entry,
    tokens: torch.Tensor,
    positions: torch.Tensor | None = None,
    caches: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return float32 logits `[1, S, vocab]` for `tokens` int64 `[1, S]`; caches are updated in place.

    `positions` defaults to 0..S-1, `caches` to fresh empty ones.
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1])[None]
    caches = new_caches(program) if caches is None else caches
    with torch.no_grad():
        return Interpreter(program, entry).run(*inputs(entry, tokens, positions, caches))


def propagate(program: Program, entry: Entry, rows: int) -> None:
    """Set `node.meta["val"]` of every node to a fake tensor (or int) of its shape for `rows` tokens."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with mode, torch.no_grad():
        tokens = torch.zeros(1, rows, dtype=torch.int64)
        caches = new_caches(program)
        _ShapeInterpreter(program, entry, mode).run(*inputs(entry, tokens, tokens.clone(), caches))

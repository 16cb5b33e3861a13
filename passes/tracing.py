"""Functions of tensors as graphs of ATen's operators, and what values a graph holds while some sizes are open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from specqd import reference
from specqd.program import Entry, Program

__all__ = ["trace", "values"]

aten = torch.ops.aten

# As capture does it: what only moves memory goes, and reshapes are one operator.
_FORWARDED = {aten.alias, aten.clone, aten.contiguous, aten.detach, aten.dropout}
_RESHAPES = {aten.view, aten._unsafe_view}


def trace(function: Callable[..., Any], given: Sequence[Any]) -> fx.Graph:
    """Return what a function calls on tensors, undecomposed, with a placeholder for each.

    Every node has its value, without data, as `meta["val"]`. Raises whatever the function raises.
    """
    with torch.no_grad():
        graph: fx.Graph = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*given).graph
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _FORWARDED:
            node.replace_all_uses_with(node.args[0])
        elif packet in _RESHAPES:
            node.target = aten.reshape.default
    graph.eliminate_dead_code()
    return graph


def values(program: Program, entry: Entry) -> dict[fx.Node, Any]:
    """Return what each node of an entry computes, tensors without data; sizes that are open are SymInts."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    declared = entry.inputs if entry.of_language_model else program.takes(entry)
    given: list[Any] = [
        _open(mode, torch.zeros(i.shape, dtype=getattr(torch, i.dtype)), i.dynamic) for i in declared
    ]
    if entry.of_language_model:
        caches = {name: _open(mode, cache, ()) for name, cache in reference.new_caches(program).items()}
        given = reference.inputs(entry, given[0], given[1], caches)
    return reference.fake_values(program, entry, mode, given)


def _open(mode: FakeTensorMode, tensor: torch.Tensor, dynamic: Sequence[int]) -> FakeTensor:
    sizes = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

"""From a graph of AOTAutograd to a Program, and how its results go back to where the graph's outputs were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from specqd.errors import CaptureError
from specqd.frontends.composites import restore_composites
from specqd.program import Entry, Input, ModelInfo, Program

__all__ = ["Outputs", "program_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Outputs:
    """How the outputs of a graph come from what it was given and what was computed.

    Attributes:
        weights: how many of the inputs are weights; they come first.
        sizes: where the value of each symbol can be read: an input behind the weights, and a dimension of it, or None
            where the input itself is the size.
        results: for each output its strides if it is a tensor, numbers or expressions of symbols; else its value.
    """

    weights: int
    sizes: dict[sympy.Symbol, tuple[int, int | None]]
    results: tuple[Any, ...]

    def assemble(self, given: Sequence[Any], found: Any) -> list[Any]:
        """Return the outputs, from all inputs and the tensors that were computed: one, or a tuple of several."""
        values = iter(found if isinstance(found, tuple) else (found,))
        sizes = {symbol: _size(given[self.weights + at], dim) for symbol, (at, dim) in self.sizes.items()}
        return [
            _strided(next(values), [_number(stride, sizes) for stride in result])
            if isinstance(result, tuple)
            else _number(result, sizes)
            for result in self.results
        ]


def program_of(module: fx.GraphModule, weights: Sequence[Tensor]) -> tuple[Program | None, Outputs]:
    """Return the Program of a graph whose first inputs are `weights`, and how its outputs come from the Program's.

    Those are the tensors among them; the Program is None where there are none.

    Raises:
        CaptureError: the graph takes a number that is no size of its tensors.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    placeholders = graph.find_nodes(op="placeholder")
    for node, old in zip(placeholders, module.graph.find_nodes(op="placeholder"), strict=True):
        node.meta = dict(old.meta)
    (output,) = graph.find_nodes(op="output")
    results = list(output.args[0])
    tensors = [node for node in results if isinstance(node, fx.Node) and isinstance(node.meta["val"], Tensor)]
    symbols = _symbols(placeholders[len(weights) :])

    outputs = Outputs(len(weights), symbols, tuple(map(_result, results)))
    if not tensors:
        return None, outputs
    output.args = (tensors[0] if len(tensors) == 1 else tuple(tensors),)
    named = _bind(graph, placeholders, weights)
    inputs = _inputs(graph, placeholders[len(weights) :], symbols)
    restore_composites(graph)
    info = ModelInfo("Graph", 0, 0, source="a graph of torch.compile")
    used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    kept = {name: weight for name, weight in named.items() if name in used}
    return Program({"target": Entry("target", graph, inputs=inputs)}, kept, info), outputs


def _symbols(placeholders: Sequence[fx.Node]) -> dict[Any, tuple[int, int | None]]:
    """Find where the value of each symbol can be read: a dimension of an input, or an input itself (None)."""
    found: dict[Any, tuple[int, int | None]] = {}
    for at, node in enumerate(placeholders):
        value = node.meta["val"]
        sizes = (
            [(None, value)]
            if isinstance(value, torch.SymInt)
            else list(enumerate(getattr(value, "shape", ())))
        )
        for dim, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, (at, dim))
    return found


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _size(value: Any, dim: int | None) -> int:
    return int(value if dim is None else value.shape[dim])


def _result(node: Any) -> Any:
    value = node.meta["val"] if isinstance(node, fx.Node) else node
    return tuple(map(_expression, value.stride())) if isinstance(value, Tensor) else _expression(value)


def _expression(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _number(value: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    return int(value.subs(sizes)) if isinstance(value, sympy.Expr) else value


def _strided(found: Tensor, strides: Sequence[int]) -> Tensor:
    """Give a tensor the strides that AOTAutograd takes it to have, and makes views by."""
    if list(found.stride()) == list(strides) or found.numel() < 2:
        return found
    # Where steps of zero repeat elements, there is one to be written.
    once = found[tuple(slice(None) if stride else slice(1) for stride in strides)]
    return torch.empty_strided(once.shape, strides, dtype=found.dtype).copy_(once).expand(found.shape)


def _bind(graph: fx.Graph, placeholders: Sequence[fx.Node], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    named = {}
    for at, (node, weight) in enumerate(zip(placeholders, weights, strict=False)):
        named[f"weight_{at}"] = weight.detach()
        with graph.inserting_before(node):
            held = graph.create_node("get_attr", f"weight_{at}")
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        graph.erase_node(node)
    return named


def _inputs(
    graph: fx.Graph, placeholders: Sequence[fx.Node], symbols: dict[Any, tuple[int, int | None]]
) -> tuple[Input, ...]:
    """Declare the tensors among the inputs; a number becomes the size of one of them that it is."""
    dims = {
        size.node.expr: (node, dim)
        for node in placeholders
        if isinstance(node.meta["val"], Tensor)
        for dim, size in enumerate(_shape(node))
        if isinstance(size, torch.SymInt)
    }
    last = placeholders[-1] if placeholders else None
    for node in placeholders:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            continue
        if node.users:
            where = dims.get(value.node.expr) if isinstance(value, torch.SymInt) else None
            if where is None or last is None:
                raise CaptureError(f"the graph takes a number, {node.name}, that is no size of its tensors")
            with graph.inserting_after(last):
                size = graph.call_function(aten.sym_size.int, where)
            size.meta = dict(node.meta)
            node.replace_all_uses_with(size)
    found = []
    for node in placeholders:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            graph.erase_node(node)
            continue
        dynamic = tuple(d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt))
        shape = tuple(int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in value.shape)
        found.append(Input(node.name, str(value.dtype).removeprefix("torch."), shape, dynamic))
    return tuple(found)

"""Decompose: an entry's graph in the operators that the table of codegen.general knows, by torch's own rules."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from specqd.codegen.general.fourier import COMPLEX
from specqd.codegen.general.rules import COMPOSITES, OWN
from specqd.errors import CodegenError
from specqd.program import Entry, Program
from specqd.reference import OpenSizes, captured_inputs

__all__ = ["Decomposed", "decompose"]

aten = torch.ops.aten

_IN_PLACE_VIEWS = {
    aten.as_strided_.default: aten.as_strided.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
    aten.unsqueeze_.default: aten.unsqueeze.default,
}


class Decomposed:
    """A graph of table operators.

    Attributes:
        graph: its placeholders are the entry's inputs and states, then its weights; every node has `meta["val"]`.
        inputs: the placeholders that are inputs or states.
        weights: the names of the weights by the placeholders that are weights.
        constants: the tensors that decompositions brought with them, by the nodes that read them.
    """

    def __init__(self, traced: fx.GraphModule, inputs: int, names: list[str]) -> None:
        """Tell inputs from weights."""
        graph = traced.graph
        placeholders = graph.find_nodes(op="placeholder")
        self.graph = graph
        self.inputs: list[fx.Node] = placeholders[:inputs]
        self.weights = dict(zip(placeholders[inputs:], names, strict=True))
        self.constants = {node: getattr(traced, node.target) for node in graph.find_nodes(op="get_attr")}


class _Runner(OpenSizes):
    """Runs an entry's graph with weights that are given."""

    def __init__(self, graph: fx.Graph, weights: dict[str, Any], sizes: ShapeEnv | None) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.weights, self.sizes = weights, sizes

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.weights[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Operators that are made of others come apart before a table of rules is asked.
        if target in COMPOSITES and (found := COMPOSITES[target](*args, **kwargs)) is not NotImplemented:
            return found
        return super().call_function(target, args, kwargs)


def decompose(program: Program, entry: Entry, known: Collection[Any]) -> Decomposed:
    """Trace an entry into operators of `known`; what torch has no rule for either stays as it is.

    Raises:
        CodegenError: the graph cannot be traced, or is only right for some of the sizes that are left open.
    """
    rules = {op: rule for op, rule in {**decomposition_table, **OWN}.items() if op not in known}
    rules |= COMPLEX
    names = program.used_weights(entry.name)
    mode, inputs = captured_inputs(program, entry)
    weights = [mode.from_tensor(program.weights[name], static_shapes=True) for name in names]
    guards = len(mode.shape_env.guards) if mode.shape_env else 0

    def run(*given: Any) -> Any:
        runner = _Runner(entry.graph, dict(zip(names, given[len(inputs) :], strict=True)), mode.shape_env)
        with traceback.preserve_node_meta():
            found = runner.run(*given[: len(inputs)])
        if any(isinstance(x, torch.Tensor) and x.is_complex() for x in tree_leaves(found)):
            raise CodegenError("an output is complex; return torch.view_as_real of it")
        return found

    try:
        with mode, torch.no_grad():
            traced = make_fx(run, rules, _allow_non_fake_inputs=True)(*inputs, *weights)
    except Exception as error:
        raise CodegenError(f"{entry.name} cannot be decomposed: {_message(error)}") from error
    _forward_copies(traced.graph)
    traced.graph.eliminate_dead_code()
    _demand_general(mode.shape_env, guards)
    return Decomposed(traced, len(inputs), names)


def _message(error: Exception) -> str:
    """What a user gets to know of it: the first line, after its type where it is torch's."""
    if isinstance(error, CodegenError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if lacking := re.search(r"Multiple dispatch failed for '(?:torch\._ops\.)?([\w.]+)'", lines[0]):
        return f"{lacking[1]} of complex numbers is not compiled; write it with real and imaginary parts"
    return f"{type(error).__name__}: {lines[0]}"


def _demand_general(sizes: ShapeEnv | None, known: int) -> None:
    """Refuse a graph that was simplified by conditions on its sizes; Dynamo still takes them as guards of its own."""
    if sizes is not None and sizes.frozen and len(sizes.guards) > known:
        condition = sizes.guards[known].expr
        raise CodegenError(
            f"the graph is only right where {condition}: give a range of dynamic_shapes that says so"
        )


def _forward_copies(graph: fx.Graph) -> None:
    """Let what reads a tensor after torch's rules have written into it read what was written.

    A tensor that is a view, or has views, is left: what else changes with it is not looked for.
    """
    for node in [node for node in graph.nodes if node.target in _IN_PLACE_VIEWS]:
        node.target = _IN_PLACE_VIEWS[node.target]
        node.args[0].replace_all_uses_with(node, lambda user, after=node: after < user)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.copy_.default:
            continue
        target = node.args[0]
        if target.op != "call_function" or _is_view(target) or any(map(_is_view, target.users)):
            continue
        with graph.inserting_before(node):
            source = graph.call_function(
                aten._to_copy.default, (node.args[1],), {"dtype": node.meta["val"].dtype}
            )
            source.meta = {**node.meta, "val": node.args[1].meta["val"].to(node.meta["val"].dtype)}
            spread = graph.call_function(aten.expand.default, (source, list(node.meta["val"].shape)))
            new = graph.call_function(
                aten.clone.default, (spread,)
            )  # no view, so that it may be written into
        spread.meta = new.meta = dict(node.meta)
        target.replace_all_uses_with(new, lambda user, after=node: after < user)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_view(node: fx.Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return node.target is not aten.copy_.default and any(r.alias_info is not None for r in returns)

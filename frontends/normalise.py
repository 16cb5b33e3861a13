"""From what torch.export hands back to the graph convention of specqd.program: named weights, no no-ops."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from specqd.errors import CaptureError

__all__ = ["normalise", "place"]

aten = torch.ops.aten

# Values are what counts in a graph, not strides: whatever only moves or renames memory goes, and `view`,
# which depends on strides, becomes `reshape`, which does not.
_FORWARDED = {
    aten.alias, aten.clone, aten.contiguous, aten.detach, aten.detach_, aten.lift, aten.lift_fresh,
    aten.lift_fresh_copy,
}  # fmt: skip
_CONVERSIONS = {aten.to, aten._to_copy, aten.type_as}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape}
_CHECKS = {aten._assert_async, aten._assert_scalar, aten._assert_tensor_metadata, aten.sym_constrain_range,
           aten.sym_constrain_range_for_size}  # fmt: skip
_WITH_LITERAL = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_TO_THE_END = 2**63 - 1


def place(node: fx.Node) -> str:
    """Say where a node comes from: the model's module and the last line of its source."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    # Names are seen from the wrapper that calls the model.
    module = (
        f"{path.removeprefix('model.') or 'model'} ({str(kind).rsplit('.', 1)[-1]})" if kind else "the model"
    )
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return f"{module}: {lines[-1]}" if lines else module


def normalise(module: fx.GraphModule, weights: Mapping[str, str], scalars: Mapping[str, float]) -> fx.Graph:
    """Return a new graph in which placeholders named in `weights` are `get_attr` nodes of the weight's name.

    Weights in `scalars` become literals where an operator takes one. No-grad and autocast blocks are inlined;
    checks and nodes that change no value go; `view` becomes `reshape`. Raises CaptureError for other
    control flow and for operators that change a tensor in place. Several outputs stay a tuple.
    """
    graph = fx.Graph()
    copier = _Copier(graph, weights, scalars)
    outputs = copier.copy(module, {})
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    graph.eliminate_dead_code()
    for weight in graph.find_nodes(op="get_attr"):
        next(iter(weight.users)).prepend(weight)  # users are in the order they were copied
    graph.lint()
    return graph


class _Copier:
    def __init__(self, graph: fx.Graph, weights: Mapping[str, str], scalars: Mapping[str, float]) -> None:
        self.graph, self.weights, self.scalars = graph, weights, scalars
        self.fetched: dict[str, fx.Node] = {}

    def copy(self, module: fx.GraphModule, known: dict[fx.Node, Any]) -> tuple[Any, ...]:
        """Copy a graph's nodes to the end of the new one and return its outputs; `known` maps old to new."""
        for node in module.graph.nodes:
            if node.op == "output":
                return tuple(map_arg(node.args[0], known.__getitem__))
            if node not in known:
                known[node] = self._new(node, module, known)
        return ()

    def _new(self, node: fx.Node, module: fx.GraphModule, known: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self._weight(node) if node.name in self.weights else self.graph.node_copy(node)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(module)  # the body of a block, to be inlined
        if isinstance(node.target, HigherOrderOperator):
            return self._inline(node, known)
        args, kwargs = (map_arg(a, known.__getitem__) for a in (node.args, node.kwargs))
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if not isinstance(node.target, OpOverload):
            return self._call(node, node.target, args, kwargs)
        return self._operator(node, node.target, args, kwargs)

    def _weight(self, node: fx.Node) -> fx.Node:
        name = self.weights[node.name]
        if name not in self.fetched:
            self.fetched[name] = self.graph.create_node("get_attr", name)
            self.fetched[name].meta = dict(node.meta)
        return self.fetched[name]

    def _inline(self, node: fx.Node, known: dict[fx.Node, Any]) -> tuple[Any, ...]:
        args = [known[a] if isinstance(a, fx.Node) else a for a in node.args]
        at = next((i for i, a in enumerate(args) if isinstance(a, fx.GraphModule)), None)
        if at is None or node.target.name() not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            raise CaptureError(f"{place(node)}: the control flow {node.target.name()} cannot be compiled")
        inner = [n for n in args[at].graph.nodes if n.op == "placeholder"]
        return self.copy(args[at], dict(zip(inner, args[at + 1 :], strict=True)))

    def _operator(self, node: fx.Node, op: OpOverload, args: Any, kwargs: Any) -> Any:
        packet = op.overloadpacket
        if packet in _CHECKS:
            return None
        if _changes_nothing(node, packet):
            return args[0]
        if packet in _CONVERSIONS:
            return self._call(node, aten.to.dtype, (args[0], node.meta["val"].dtype), {})
        if packet is aten.embedding:
            return self._call(node, op, args[:2], {})  # the rest only concerns gradients
        if packet is aten.index and _looks_up(args):
            return self._call(node, aten.embedding.default, (args[0], args[1][0]), {})
        if packet in _RESHAPES and op is not aten.view.dtype:
            return self._call(node, aten.reshape.default, args[:2], {})
        if op._schema.is_mutable:
            raise CaptureError(f"{place(node)}: {op} changes a tensor in place, which cannot be compiled")
        return self._call(node, op, args, kwargs)

    def _call(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        if target in _WITH_LITERAL:
            commutes = target in (aten.add.Tensor, aten.mul.Tensor) and not kwargs
            swap = commutes and self._literal(args[0]) is not args[0]
            left, right = (args[1], args[0]) if swap else args
            args = (left, self._literal(right))
        new = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        new.meta = dict(node.meta)
        return new

    def _literal(self, value: Any) -> Any:
        return self.scalars.get(str(value.target), value) if isinstance(value, fx.Node) else value


def _looks_up(args: tuple[Any, ...]) -> bool:
    """Say whether an `index` takes rows of a weight matrix, as an embedding does."""
    table, index = args[:2]
    matrix = isinstance(table, fx.Node) and table.op == "get_attr" and table.meta["val"].dim() == 2
    return matrix and len(index) == 1 and index[0].meta["val"].dtype == torch.int64


def _changes_nothing(node: fx.Node, packet: Any) -> bool:
    source = node.args[0] if node.args else None
    before, after = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in (source, node))
    if packet in _FORWARDED:
        return True
    if packet is aten.dropout:
        return node.args[1] == 0 or not node.args[2]
    if not (isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype):
        return False
    if packet is aten.mul:
        return node.args[1] == 1 and before.is_floating_point()
    if packet is aten.slice:
        start, end, step = (*node.args, *(None,) * 5)[2:5]
        return start in (None, 0) and end in (None, _TO_THE_END) and step in (None, 1)
    return packet in _CONVERSIONS or (packet in {*_RESHAPES, aten.expand} and _same_shape(before, after))


def _same_shape(a: Tensor, b: Tensor) -> bool:
    if a.dim() != b.dim():
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))

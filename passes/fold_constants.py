"""fold-constants: what depends on weights alone is computed once, and stored."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from specqd.program import Entry, Program
from specqd.reference import weight_seen

from .contract import Pass, Refusal
from .rewrite import add_weight, plain_name, read_weight
from .tracing import values

__all__ = ["FoldConstants"]

aten = torch.ops.aten

_UNFILLED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class FoldConstants(Pass):
    """Replace calls whose arguments are all constant by a stored weight that holds their result.

        mul(exp(w), 2)  ->  w.mul

    1. A weight is constant, and so is a call of constants and numbers alone, such as `arange(9)`. The last of such
       calls is replaced, and those before it die with it; one that no weight or call is an argument of stays.
    2. Results are those of eager torch, bit for bit.
    3. The new weight is named after the first weight that it comes from, if there is one, and the operator.

    Refused: a result of more bytes than the weights it comes from and `spare_bytes` together; random numbers, and
    memory that nobody has filled; and what reads a pruned weight, whose dense form a calibration may still need.

    Attributes:
        spare_bytes: by how much a result may be larger than the weights that it comes from.
    """

    name = "fold-constants"
    spare_bytes: int = 1 << 16

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Find what is constant, then compute what the rest of the graph reads of it."""
        constant = _constant(entry.graph)
        last = [n for n in constant if _folds(n) and any(user not in constant for user in n.users)]
        known = values(program, entry) if last else {}
        results: dict[fx.Node, Any] = {}
        for node in last:
            if not isinstance(known[node], Tensor):
                continue
            behind = _behind(node)
            sources = [n for n in constant if n in behind]
            why = _why_not(sources) or self._unsuitable(program, known[node], constant[node])
            if why:
                yield Refusal(node.name, why)
                continue
            for source in sources:
                if source not in results:
                    results[source] = _computed(program, entry, source, results)
            name = ".".join([*constant[node][:1], plain_name(node.target)])
            stored = read_weight(node, add_weight(program, name, results[node].detach().clone()))
            node.replace_all_uses_with(stored)
            yield stored

    def _unsuitable(self, program: Program, value: Tensor, weights: tuple[str, ...]) -> str | None:
        pruned = next((name for name in weights if name in program.dense), None)
        if pruned:
            return f"{pruned} is pruned, and a calibration may need it as it is"
        size = value.numel() * value.element_size()
        before = sum(program.weights[name].numel() * program.weights[name].element_size() for name in weights)
        if size > before + self.spare_bytes:
            return f"it would store {size:,} bytes in the place of {before:,}"
        return None


def _constant(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """Return the nodes that are the same at each call, with the names of the weights they come from."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = (str(node.target),)
        elif node.op == "call_function" and all(source in found for source in node.all_input_nodes):
            schema = getattr(node.target, "_schema", None)
            if node.target is operator.getitem or (schema is not None and not schema.is_mutable):
                names = (name for source in node.all_input_nodes for name in found[source])
                found[node] = tuple(dict.fromkeys(names))
    return found


def _folds(node: fx.Node) -> bool:
    return node.op == "call_function" and bool(node.all_input_nodes)


def _behind(node: fx.Node) -> set[fx.Node]:
    """Return all that a node is computed from, and the node."""
    found, waiting = {node}, [node]
    while waiting:
        more = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(more)
        waiting += more
    return found


def _why_not(sources: list[fx.Node]) -> str | None:
    """Look for what gives something else each time."""
    for at in sources:
        if torch.Tag.nondeterministic_seeded in getattr(at.target, "tags", ()):
            return f"{at} draws random numbers"
        if getattr(at.target, "overloadpacket", None) in _UNFILLED:
            return f"{at} is memory that nobody has filled"
    return None


def _computed(program: Program, entry: Entry, node: fx.Node, results: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return weight_seen(entry, program.weights[str(node.target)])
    args, kwargs = (map_arg(a, results.__getitem__) for a in (node.args, node.kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)

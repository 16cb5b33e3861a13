"""common-subexpressions: what a graph computes twice it computes once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from specqd.program import Entry, Program

from .contract import Pass, Refusal
from .match import repeatable

__all__ = ["CommonSubexpressions"]


class CommonSubexpressions(Pass):
    """Let the readers of a call read an earlier one that calls the same operator with the same arguments.

        f(x, 1), f(x, 1)  ->  y = f(x, 1); y, y

    1. Arguments are the same if they are one node, calls that are the same in turn, reads of one weight, or equal
       constants of one type. The result is the same bits.
    2. Operators that draw random numbers or write into a tensor give something new each time and are not looked at,
       nor is what reads a tensor that another operator writes into.

    Refused: a call of which both copies are outputs, for whoever gets them may change one of them in place.
    """

    name = "common-subexpressions"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Walk from the inputs on, so that merged arguments are seen by what reads them."""
        given_out = set(entry.graph.output_node().all_input_nodes)
        first: dict[Any, fx.Node] = {}
        for node in list(entry.graph.nodes):
            if not repeatable(node) or any(map(_written, node.all_input_nodes)):
                continue
            twin = first.setdefault(_call(node), node)
            if twin is node:
                continue
            if node in given_out and twin in given_out:
                yield Refusal(node.name, f"it and {twin}, which is the same, are both outputs")
                continue
            if node in given_out:
                given_out.add(twin)
            node.replace_all_uses_with(twin)
            entry.graph.erase_node(node)
            yield twin


def _written(node: fx.Node) -> bool:
    """Whether an operator writes into what a node holds, so that its readers depend on when they read."""
    schemas = (getattr(user.target, "_schema", None) for user in node.users)
    return any(schema is not None and schema.is_mutable for schema in schemas) and node.op == "placeholder"


def _call(node: fx.Node) -> Any:
    return node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items())))


def _key(value: Any) -> Any:
    """Turn an argument into what is equal for the same ones: 1, 1.0 and True are not, nor 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, slice):
        return "slice", _key((value.start, value.stop, value.step))
    if isinstance(value, fx.Node):
        return ("weight", value.target) if value.op == "get_attr" else value
    return type(value), repr(value)

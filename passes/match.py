"""Words for reading a graph: what a node calls, with which arguments, who uses it, what shape it has."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from specqd import reference
from specqd.program import Entry, Program

__all__ = [
    "LINEARS", "Part", "arguments", "cache_of", "calls", "changed", "head", "literal", "only_user", "part",
    "repeatable", "same", "shapes", "weight_of", "weight_uses",
]  # fmt: skip

aten, ops = torch.ops.aten, torch.ops.specqd

LINEARS = (aten.linear, ops.linear_mxfp4, ops.linear_int8, ops.linear_refined)
"""Products of an activation and a stored matrix."""

# Any row count would do; a prime that is no likely head count or width keeps accidental equalities away.
_ROWS = 7


def calls(node: Any, *packets: Any) -> bool:
    """Say whether a node calls an overload of one of the operators."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return getattr(node.target, "overloadpacket", node.target) in packets


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return an operator call's arguments by name, with the schema's defaults filled in."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {a.name: a.default_value for a in schema if a.has_default_value()} | given | dict(node.kwargs)


def changed(node: fx.Node, **given: Any) -> tuple[Any, ...]:
    """Return all arguments of an operator call in the schema's order, with those that are given in the place of its."""
    of_call = arguments(node) | given
    return tuple(of_call[a.name] for a in node.target._schema.arguments)


def cache_of(node: fx.Node) -> str:
    """Return the name of the cache that an attention writes to and reads."""
    return str(arguments(node)["cache_k"].target).removesuffix("_k")


def only_user(node: fx.Node, *packets: Any) -> fx.Node | None:
    """Return the one node that uses this one, if there is just one and it calls one of the operators."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and (calls(user, *packets) or not packets) else None


def literal(node: fx.Node, packet: Any) -> tuple[fx.Node, float] | None:
    """Read `op(tensor, number)` as the tensor and the number; `add` and `mul` take either order."""
    given = arguments(node)
    if not calls(node, packet) or given.get("alpha", 1) != 1:
        return None
    a, b = given["self"], given["other"]
    a, b = (b, a) if isinstance(b, fx.Node) and packet in (aten.add, aten.mul) else (a, b)
    return (a, float(b)) if isinstance(a, fx.Node) and isinstance(b, (int, float)) else None


def repeatable(node: fx.Node) -> bool:
    """Say whether a call gives the same again for the same arguments: no random numbers, nothing written into."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return (
        schema is not None
        and not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def same(a: Any, b: Any, depth: int = 4) -> bool:
    """Say whether two values are equal because they are one node, or the same call of the same values."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and repr(a) == repr(b)  # 0.0 and -0.0 are equal, but no twins
    if (
        a is b
        or depth == 0
        or a.op != "call_function"
        or a.target is not b.target
        or len(a.args) != len(b.args)
    ):
        return a is b
    if not repeatable(a) or a.kwargs or b.kwargs:
        return False
    return all(same(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def shapes(program: Program, entry: Entry) -> dict[fx.Node, torch.Size]:
    """Return the shape of every tensor in an entry, with some number of rows; changes no metadata."""
    found = reference.example_values(program, entry, _ROWS)
    return {node: value.shape for node, value in found.items() if isinstance(value, torch.Tensor)}


class Part(NamedTuple):
    """Channels `start` to `end` of the last dimension of `whole`."""

    whole: fx.Node
    start: int
    end: int


def part(node: object, known: dict[fx.Node, torch.Size]) -> Part | None:
    """Read a slice of the last dimension, or an output of a chunk or split of it."""
    if not isinstance(node, fx.Node):
        return None
    if calls(node, aten.slice):
        given = arguments(node)
        source, size = given["self"], known[given["self"]]
        if given["dim"] not in (-1, len(size) - 1) or given["step"] != 1:
            return None
        start = given["start"] or 0
        start = start + size[-1] if start < 0 else start
        return Part(source, start, start + known[node][-1])
    several, index = (*node.args, None, None)[:2]
    if node.op != "call_function" or not calls(several, aten.chunk, aten.split, aten.split_with_sizes):
        return None
    given = arguments(several)
    source = given["self"]
    if given["dim"] not in (-1, len(known[source]) - 1):
        return None
    sizes = {n.args[1]: known[n][-1] for n in several.users}
    before = [sizes.get(i) for i in range(index)]
    return None if None in before else Part(source, sum(before), sum(before) + known[node][-1])  # type: ignore[arg-type]


def weight_of(node: fx.Node) -> str | None:
    """Return the name of the matrix that a linear call multiplies by, if it is a stored weight."""
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def weight_uses(graph: fx.Graph, name: str) -> list[fx.Node]:
    """Return the nodes that read the weight of that name."""
    return [user for n in graph.nodes if n.op == "get_attr" and n.target == name for user in n.users]


def head(graph: fx.Graph) -> fx.Node | None:
    """Return the linear that makes the logits: the first on the way back from the output, if it is alone."""
    node = next(n for n in reversed(graph.nodes) if n.op == "output")
    while not calls(node, *LINEARS):
        computed = [
            n for n in node.all_input_nodes if n.op == "call_function" and not calls(n, aten.sym_size)
        ]
        if len(computed) != 1:
            return None
        node = computed[0]
    return node

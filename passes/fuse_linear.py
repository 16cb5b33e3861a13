"""fuse-linear: one matrix product for all that read the same activation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch import fx

from specqd.program import Entry, Program

from .contract import Pass, Refusal
from .match import arguments, calls, head, weight_of, weight_uses
from .rewrite import add_weight, read_weight, replace

__all__ = ["FuseLinear"]

aten = torch.ops.aten


class FuseLinear(Pass):
    """Join linears that read the same value into one, over the rows of all their weights.

        linear(x, q), linear(x, k)  ->  y = linear(x, [q; k]); y[..., :a], y[..., a:b]

    1. Weights of one dtype are joined, with biases if all have one (of one dtype); what differs forms a group
       of its own.
    2. The new weight is named after its parts: `layers.0.self_attn.{q_proj+k_proj+v_proj}.weight`.
    3. The linear that makes the logits is never joined.

    Refused: a weight that is computed, or read elsewhere too (it would be stored twice), and a linear whose
    dtype or bias none of the others that read the same value has. Sums stay in order along the input
    dimension, but a kernel may choose another order for another number of rows.
    """

    name = "fuse-linear"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Group by input, refuse what cannot join, and join the rest by kind."""
        last = head(entry.graph)
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in entry.graph.nodes:
            if calls(node, aten.linear) and node is not last:
                readers.setdefault(node.args[0], []).append(node)
        for nodes in readers.values():
            if len(nodes) == 1:
                continue
            kinds: dict[tuple, list[fx.Node]] = {}
            for node in nodes:
                reason = _unsuitable(entry.graph, node)
                if reason:
                    yield Refusal(node.name, reason)
                else:
                    kinds.setdefault(_kind(program, node), []).append(node)
            for kind, members in kinds.items():
                if len(members) > 1:
                    yield from _join(program, members)
                elif len(kinds) > 1:
                    yield Refusal(members[0].name, _alone(kind, members[0]))


def _unsuitable(graph: fx.Graph, node: fx.Node) -> str | None:
    bias = arguments(node)["bias"]
    if weight_of(node) is None or not (bias is None or bias.op == "get_attr"):
        return "its weight or bias is computed, not stored"
    readers = [n.name for n in weight_uses(graph, str(weight_of(node))) if n is not node]
    return f"its weight {weight_of(node)} is also read by {readers[0]}" if readers else None


def _kind(program: Program, node: fx.Node) -> tuple[torch.dtype, torch.dtype | None]:
    bias = arguments(node)["bias"]
    return program.weights[str(weight_of(node))].dtype, bias and program.weights[str(bias.target)].dtype


def _alone(kind: tuple, node: fx.Node) -> str:
    bias = "no bias" if kind[1] is None else f"a bias in {kind[1]}"
    return f"no other linear that reads {node.args[0]} has a weight in {kind[0]} and {bias}"


def _join(program: Program, members: Sequence[fx.Node]) -> Iterator[fx.Node]:
    first = members[0]
    biases = [arguments(n)["bias"] for n in members]
    args: list[fx.Node] = [first.args[0]]
    for names in ([str(weight_of(n)) for n in members], [str(b.target) for b in biases if b is not None]):
        if names:
            joined = torch.cat([program.weights[name] for name in names])
            args.append(read_weight(first, add_weight(program, _joint_name(names), joined)))
    with first.graph.inserting_before(first):
        whole = first.graph.create_node("call_function", aten.linear.default, tuple(args), name="linear")
    whole.meta = {k: first.meta[k] for k in ("nn_module_stack", "stack_trace") if k in first.meta}
    yield whole
    start = 0
    for member in members:
        end = start + len(program.weights[str(weight_of(member))])
        replace(member, aten.slice.Tensor, (whole, -1, start, end))
        start = end


def _joint_name(names: Sequence[str]) -> str:
    """Join dotted names by what differs: `a.x.weight, a.y.weight` to `a.{x+y}.weight`."""
    parts = [name.split(".") for name in names]
    prefix = _common(parts)
    suffix = min(_common([p[::-1] for p in parts]), *(len(p) - prefix - 1 for p in parts))
    middles = "+".join(".".join(p[prefix : len(p) - suffix]) for p in parts)
    return ".".join([*parts[0][:prefix], "{" + middles + "}", *parts[0][len(parts[0]) - suffix :]])


def _common(lists: Sequence[Sequence[str]]) -> int:
    """Count the leading words that all lists share."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False)))

"""Residual blocks of a graph, found by what flows: where one value alone carries on what the tokens are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from specqd.passes.match import calls
from specqd.program import Entry

__all__ = ["Block", "Blocks", "residual_blocks"]

aten, ops = torch.ops.aten, torch.ops.specqd


@dataclass(frozen=True)
class Block:
    """A layer: its nodes in order, which take the value of `start` to that of `end`, the last of them."""

    start: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def end(self) -> fx.Node:
        """The value that it leaves."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Blocks:
    """A graph's layers in a row, and the nodes before and after them; only nodes that depend on the tokens."""

    before: tuple[fx.Node, ...]
    layers: tuple[Block, ...]
    after: tuple[fx.Node, ...]


def residual_blocks(entry: Entry) -> Blocks:
    """Cut a graph into layers, each with one attention.

    1. A cut is a node after which nothing computed from the tokens before it is read any more, but for itself.
    2. A layer goes from the last cut before its attention to the last cut before the next one.
    3. The last layer ends where the operators since its begin are those of an earlier layer; the norm before the head
       is not its. Without an earlier layer that is alike, it does not count as one.
    """
    flow = _flow(entry)
    cuts = _cuts(flow)
    places = [i for i, node in enumerate(flow) if calls(node, ops.cached_attention, ops.causal_attention)]
    begins = [max((cut for cut in cuts if cut < place), default=-1) for place in places]
    if not begins or begins[0] < 0 or len(set(begins)) < len(begins):
        return Blocks(tuple(flow), (), ())
    spans = list(pairwise(begins))
    kinds = {tuple(str(node.target) for node in flow[a + 1 : b + 1]) for a, b in spans}
    last = begins[-1]
    ends = [
        last + len(kind)
        for kind in kinds
        if last + len(kind) in cuts
        and kind == tuple(str(node.target) for node in flow[last + 1 : last + 1 + len(kind)])
    ]
    spans += [(last, min(ends))] if ends else []
    if not spans:
        return Blocks(tuple(flow), (), ())
    layers = tuple(Block(flow[a], tuple(flow[a + 1 : b + 1])) for a, b in spans)
    return Blocks(tuple(flow[: spans[0][0] + 1]), layers, tuple(flow[spans[-1][1] + 1 :]))


def _flow(entry: Entry) -> list[fx.Node]:
    """The calls that depend on what the tokens are, not only on how many there are."""
    depends: dict[fx.Node, None] = {}
    for node in entry.graph.nodes:
        if (node.op == "placeholder" and node.target == "tokens") or (
            any(given in depends for given in node.all_input_nodes) and not calls(node, aten.sym_size)
        ):
            depends[node] = None
    return [node for node in depends if node.op == "call_function"]


def _cuts(flow: list[fx.Node]) -> set[int]:
    place = {node: i for i, node in enumerate(flow)}
    cuts, needed = set(), -1
    for i, node in enumerate(flow):
        if needed <= i:
            cuts.add(i)
        needed = max(needed, *(place.get(user, len(flow)) for user in node.users), -1)
    return cuts

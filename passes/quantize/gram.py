"""Gram matrices X^T X of what goes into linears, one at a time, while texts run through an entry in step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from specqd.program import Entry, Program
from specqd.reference import Interpreter, inputs, new_caches

__all__ = ["grams"]


def grams(
    program: Program, entry: Entry, linears: Sequence[fx.Node], texts: Sequence[Sequence[int]]
) -> Iterator[tuple[list[fx.Node], Tensor]]:
    """Yield the linears that share an input, and its Gram matrix float64 [K, K], in the order of the graph.

    1. All texts go through a node before any goes through the next one. So one Gram matrix, and the values of a few
       nodes, are all that is held at a time. Nothing runs after the last of `linears` is reached.
    2. The first position of each text is left out of the sum. There a model may put values a thousand times
       larger than anywhere else, which would outweigh all others, and no draft is ever made there.
    3. Attention writes every position before it reads any, so all layers and texts use one layer's cache.

    Args:
        program: holds the weights and declares the caches.
        entry: whose graph holds the linears.
        linears: `aten.linear` nodes, in the order of the graph.
        texts: tokens of each text, at positions from 0; two or more each.
    """
    if not linears:
        return
    groups: dict[fx.Node, list[fx.Node]] = {}
    for linear in linears:
        groups.setdefault(linear.args[0], []).append(linear)
    first = {members[0]: source for source, members in groups.items()}
    caches = _one_layer(program, max(map(len, texts)))
    runs = [_Text(program, entry, torch.tensor([text]), caches) for text in texts]
    for node in entry.graph.nodes:
        if node in first:
            source = first.pop(node)
            yield groups[source], _gram([run.env[source] for run in runs])
            if not first:
                return
        _advance(runs, node)


class _Text(Interpreter):
    """One text on its way through the graph."""

    def __init__(self, program: Program, entry: Entry, tokens: Tensor, caches: dict[str, Tensor]) -> None:
        super().__init__(program, entry)
        given = inputs(entry, tokens, torch.arange(tokens.shape[1])[None], caches)
        self.env = dict(zip(entry.graph.find_nodes(op="placeholder"), given, strict=True))


def _advance(runs: list[_Text], node: fx.Node) -> None:
    if node.op == "placeholder":
        return
    with torch.no_grad():
        weight = runs[0].run_node(node) if node.op == "get_attr" else None
        for run in runs:
            run.env[node] = run.run_node(node) if weight is None else weight
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]


def _gram(values: list[Tensor]) -> Tensor:
    width = values[0].shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for value in values:
        rows = value.reshape(-1, width)[1:]
        total += rows.T @ rows
    return total


def _one_layer(program: Program, length: int) -> dict[str, Tensor]:
    small = program.copy()
    small.caches = {
        name: dataclasses.replace(cache, layers=1, capacity=length) for name, cache in program.caches.items()
    }
    layers = {f"{c.name}_{part}": c.layers for c in program.caches.values() for part in "kv"}
    return {name: tensor.expand(layers[name], -1, -1, -1) for name, tensor in new_caches(small).items()}

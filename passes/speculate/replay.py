"""Run an entry over texts that are known already, layer by layer, as it would draft after each of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from specqd.cache_formats import held
from specqd.passes.match import arguments, calls
from specqd.program import Entry, Program
from specqd.reference import Interpreter

from .residual import Block, Blocks

__all__ = ["Held", "Replay"]

aten, ops = torch.ops.aten, torch.ops.specqd

Held = Mapping[tuple[str, int], tuple[Tensor, Tensor]]
"""Keys and values [heads, rows, channels] by the cache's input and layer."""


class Replay(Interpreter):
    """All texts in one pass, as rows that meet in attention only.

    `of_target` are keys and values of the target on the same texts. An entry that shares the target's cache attends
    to those for all earlier positions, and to its own for the position itself: as when it drafts the first token
    of a round. What the entry itself computes is `held` afterwards.
    """

    def __init__(
        self, program: Program, entry: Entry, texts: Sequence[Sequence[int]], of_target: Held | None = None
    ) -> None:
        super().__init__(program, entry)
        self._dtypes = {f"{c.name}_k": (c.key_dtype, c.value_dtype) for c in program.caches.values()}
        self._lengths = [len(text) for text in texts]
        given = {
            "tokens": torch.tensor([[token for text in texts for token in text]]),
            "positions": torch.cat([torch.arange(length) for length in self._lengths])[None],
        }
        self._inputs = [given.get(str(node.target)) for node in entry.graph.find_nodes(op="placeholder")]
        self._output = next(n for n in reversed(entry.graph.nodes) if n.op == "output").all_input_nodes[0]
        self._of_target = of_target or {}
        self.held: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def logits(self) -> Tensor:
        """Run everything; return logits float32 [rows, vocabulary]."""
        with torch.no_grad():
            logits: Tensor = self.run(*self._inputs)
        return logits[0]

    def before(self, blocks: Blocks) -> Tensor:
        """Return what goes into the first layer."""
        placeholders = self.graph.find_nodes(op="placeholder")
        self.env = dict(zip(placeholders, self._inputs, strict=True))
        return self._through(blocks.before, blocks.layers[0].start)

    def layer(self, block: Block, hidden: Tensor) -> Tensor:
        """Return what a layer makes of what goes into it."""
        self.env[block.start] = hidden
        return self._through(block.nodes, block.end)

    def after(self, blocks: Blocks, hidden: Tensor) -> Tensor:
        """Return the logits [rows, vocabulary] that follow from what the last layer leaves."""
        self.env[blocks.layers[-1].end] = hidden
        return self._through(blocks.after, self._output)[0]

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; attention within each text, and every size that is not fixed is the number of rows."""
        if calls(n, aten.sym_size):
            return sum(self._lengths)
        if not calls(n, ops.cached_attention):
            return super().run_node(n)
        given = arguments(n)
        cache, layer = str(given["cache_k"].target), int(given["layer"])
        q, k, v = (self.env[given[name]] for name in ("q", "k", "v"))
        sinks = None if given["sinks"] is None else self.env[given["sinks"]]
        of_keys, of_values = self._dtypes[cache]
        k, v = held(k[0], of_keys, keys=True), held(v[0], of_values)
        self.held[cache, layer] = k, v
        keys, values = self._of_target.get((cache, layer), (k, v))
        options = given["scale"], given["window"], given["softcap"], sinks
        by_text = (x.split(self._lengths, -2) for x in (q[0], k, v, keys, values))
        return torch.cat([_attend(of_text, options) for of_text in zip(*by_text, strict=True)])[None]

    def _through(self, nodes: Sequence[fx.Node], wanted: fx.Node) -> Tensor:
        """Run nodes in order, and what else they need; forget all their values but that of `wanted`."""
        with torch.no_grad():
            for node in nodes:
                self.env[node] = self._value(node)
        result: Tensor = self.env[wanted]
        for node in nodes:
            del self.env[node]
        return result

    def _value(self, node: fx.Node) -> Any:
        needed = [] if calls(node, aten.sym_size) else node.all_input_nodes
        for other in needed:
            if other not in self.env:
                self.env[other] = self._value(other)
        result = self.run_node(node)
        for other in needed:
            if other.op == "get_attr":
                self.env.pop(other, None)
        return result


def _attend(of_text: tuple[Tensor, ...], options: tuple[float, int, float, Tensor | None]) -> Tensor:
    """Attention [rows, heads, channels] as of specqd::causal_attention.

    `of_text` are queries, own keys and values, and those of earlier positions, each [heads, rows, channels].
    """
    q, k, v, keys, values = of_text
    scale, window, softcap, sinks = options
    groups = q.shape[0] // k.shape[0]
    k, v, keys, values = (x.repeat_interleave(groups, 0) for x in (k, v, keys, values))
    rows = torch.arange(q.shape[1])
    itself = torch.eye(len(rows), dtype=torch.bool)
    scores = torch.where(itself, (q * k).sum(-1, keepdim=True), q @ keys.transpose(-1, -2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    back = rows[:, None] - rows
    scores = scores.masked_fill((back < 0) | (back >= (window or len(rows))), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, len(rows), 1)], -1)
    weights = torch.softmax(scores, -1)[..., : len(rows)]
    own = weights.diagonal(dim1=-2, dim2=-1)[..., None]
    return (weights @ values + own * (v - values)).transpose(0, 1)

"""Gram matrices of what goes into layers, summed over batches, so that no activation outlives its batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from specqd.passes.contract import Progress
from specqd.passes.match import arguments
from specqd.program import Entry, Program
from specqd.reference import Interpreter

from .layers import Layer

__all__ = ["grams"]

_MEMORY = 1 << 29  # bytes of Gram matrices that are summed at a time
_ROWS = 1 << 24  # elements of rows that are made at a time


def grams(
    program: Program,
    entry: Entry,
    layers: Sequence[Layer],
    batches: Collection[tuple[Any, ...]],
    apart: int = 0,
) -> Iterator[tuple[Layer, *tuple[Tensor, ...]] | Progress]:
    """Yield layers and their Gram matrices float64 [groups, K + 1, K + 1], in the order of the graph.

    1. G = X^T X, where a row of X holds what a row of the layer's matrix is multiplied with, then a one. So its
       last row holds sums of inputs, and its last element how many rows there were.
    2. Layers with the same input share it. So many are summed at a time as half a gigabyte holds; for the next ones
       the batches run again.
    3. A layer with several products has the sum of theirs.

    Args:
        program: holds the weights; they should not change in between, all batches are to see the same ones.
        entry: whose graph holds the layers.
        layers: in the order of the graph.
        batches: values of the placeholders; may make them anew each time, but the same ones.
        apart: yield two matrices for each layer, the second of each `apart`-th batch alone, the first of the others.
    """
    pending, parts = list(layers), 2 if apart else 1
    while pending:
        chosen: dict[Any, int] = {}
        now: list[Layer] = []
        for layer in pending:
            size = layer.groups * (layer.shape[1:].numel() + 1) ** 2 * 8 * parts
            added = {_key(layer, node): size for node in layer.nodes}
            if now and sum((chosen | added).values()) > _MEMORY:
                break
            chosen |= added
            now.append(layer)
        pending = pending[len(now) :]
        sums: list[dict[Any, Tensor]] = [{} for _ in range(parts)]
        for number, batch in enumerate(batches):
            yield Progress("running the dense model", number, len(batches))
            part = sums[1 if apart and number % apart == apart - 1 else 0]
            with torch.no_grad():
                _Watched(program, entry, now, part).finish(batch)
        for layer in now:
            keys = {_key(layer, node): None for node in layer.nodes}
            yield layer, *(torch.stack([part[key] for key in keys]).sum(0) for part in sums if part)


def _key(layer: Layer, node: fx.Node) -> tuple[Any, ...]:
    """What the rows of a layer depend on."""
    given = arguments(node)
    geometry = (repr(given.get(name)) for name in ("stride", "padding", "dilation"))
    return (node.args[0], tuple(layer.shape[1:]), layer.groups, *geometry)


class _Enough(Exception):  # noqa: N818
    pass


class _Watched(Interpreter):
    """Runs an entry up to the last layer, and adds to Gram matrices on the way."""

    def __init__(self, program: Program, entry: Entry, layers: list[Layer], sums: dict[Any, Tensor]) -> None:
        super().__init__(program, entry)
        self.extra_traceback = False  # of _Enough nobody needs one
        self.sums = sums
        self.awaited = {node: layer for layer in layers for node in layer.nodes}
        self.done: set[Any] = set()

    def finish(self, batch: tuple[Any, ...]) -> None:
        try:
            self.run(*batch)
        except _Enough:
            self.env.clear()

    def run_node(self, node: fx.Node) -> Any:
        layer = self.awaited.pop(node, None)
        if layer is not None:
            key = _key(layer, node)
            if key not in self.done:
                self.done.add(key)
                self._add(key, layer, node, self.env[node.args[0]])
            if not self.awaited:
                raise _Enough
        return super().run_node(node)

    def _add(self, key: Any, layer: Layer, node: fx.Node, x: Tensor) -> None:
        width = layer.shape[1:].numel()
        if key not in self.sums:
            self.sums[key] = x.new_zeros(layer.groups, width + 1, width + 1, dtype=torch.float64)
        total = self.sums[key]
        # A position's rows take at most a kernel's size more than its inputs.
        x = x[None] if x.dim() < len(layer.shape) else x  # an image without a batch
        parts = -(-x.numel() * layer.shape[2:].numel() // _ROWS)
        for part in x.tensor_split(min(parts, len(x))):
            rows = layer.rows(node, part)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            total[:, :-1, :-1] += rows.mT @ rows
            total[:, -1, :-1] += rows.sum(1)
            total[:, -1, -1] += rows.shape[1]
        total[:, :-1, -1] = total[:, -1, :-1]

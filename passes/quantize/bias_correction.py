"""The mean error of each output channel that rounding to INT8 makes, on calibration data."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from specqd.passes.contract import Progress
from specqd.passes.match import calls, changed, weight_of
from specqd.program import Entry, Program

from .affine import Affine
from .int8 import decode
from .watching import watched

__all__ = ["Rounded", "mean_errors"]

aten = torch.ops.aten


class Rounded(NamedTuple):
    """How a product's input is quantised, and its weight: int8 [N, ...] flat in the rest, float32 scales [N]."""

    input: Affine
    values: Tensor
    scales: Tensor


def mean_errors(
    program: Program, entry: Entry, rounded: Mapping[fx.Node, Rounded], batches: Collection[tuple[Any, ...]]
) -> Generator[Progress, None, dict[fx.Node, Tensor]]:
    """Return float32 [N] for each product: the mean of what rounding its input and weight takes off its output.

    Inputs are those of the float model, so that errors of layers before do not count (Nagel et al., arXiv 1906.04721,
    section 4.2, with measured means).
    """
    sums: dict[fx.Node, Tensor] = {}
    counts = dict.fromkeys(rounded, 0)

    def see(node: fx.Node, value: Tensor, read: Mapping[fx.Node, Any]) -> None:
        how, shape = rounded[node], program.weights[str(weight_of(node))].shape
        x, _, *rest = changed(node)
        given = [read[a] if isinstance(a, fx.Node) else a for a in rest]
        weight = decode(how.values, how.scales).reshape(shape)
        lost = (value - node.target(how.input.rounded(read[x]), weight, *given)).double()
        lost = lost.movedim(-1 if calls(node, aten.linear) else 1 - len(shape), 0).flatten(1)
        sums[node] = sums.get(node, 0) + lost.sum(1)
        counts[node] += lost.shape[1]

    yield from watched(program, entry, batches, "correcting biases", rounded, see)
    return {n: (total / counts[n]).float() for n, total in sums.items()}

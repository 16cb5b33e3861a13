"""The mean error of each output channel that rounding to INT8 makes, on calibration data."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from specqd.passes.contract import Progress
from specqd.passes.match import calls, changed
from specqd.program import Entry, Program
from specqd.reference import Interpreter

from .affine import Affine
from .int8 import decode

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

    class Watcher(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in rounded:
                lost = (value - self._rounded(n)).double()
                lost = lost.movedim(-1 if calls(n, aten.linear) else -len(n_weight(n)) + 1, 0).flatten(1)
                sums[n] = sums.get(n, 0) + lost.sum(1)
                counts[n] += lost.shape[1]
            return value

        def _rounded(self, n: fx.Node) -> Tensor:
            how, shape = rounded[n], n_weight(n)
            weight = decode(how.values, how.scales).reshape(shape)
            x = how.input.rounded(self.env[n.args[0]])
            given = [self.env[a] if isinstance(a, fx.Node) else a for a in changed(n)]
            return n.target(x, weight, *given[2:])

    def n_weight(n: fx.Node) -> torch.Size:
        return program.weights[str(n.args[1].target)].shape

    for number, batch in enumerate(batches):
        yield Progress("correcting biases", number, len(batches))
        with torch.no_grad():
            Watcher(program, entry).run(*batch)
    return {n: (total / counts[n]).float() for n, total in sums.items()}

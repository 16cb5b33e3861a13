"""Which layers a draft can do without: greedily, by agreement with the target on a text and a model of the cost."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from specqd.passes.contract import Progress
from specqd.passes.match import LINEARS, calls
from specqd.passes.quantize.calibration_text import known_to
from specqd.program import Entry, Program

from .replay import Replay
from .residual import residual_blocks

__all__ = ["Found", "Trial", "predicted_speedup", "search"]

ops = torch.ops.specqd

_ROW = 0.04  # of a plain step: what a further row of the verify pass takes
_LONGEST = 15  # tokens drafted a round


@dataclass(frozen=True)
class Found:
    """The layers to leave out, ascending, and figures in words: of what was found, or why nothing was."""

    layers: list[int]
    figures: str


@dataclass(frozen=True)
class Trial:
    """How a draft without `layers` does: its agreement, and a step's cost over one of the target's."""

    layers: frozenset[int]
    agreement: float
    cost: float

    @property
    def speedup(self) -> float:
        """The speed-up it promises."""
        return predicted_speedup(self.agreement, self.cost)

    def __str__(self) -> str:
        """Give the figures."""
        return (
            f"{self.agreement:.3f} of its choices are the target's, a step costs {self.cost:.3f} of the target's, "
            f"and the predicted speed-up is {self.speedup:.3f}"
        )


def predicted_speedup(agreement: float, cost: float) -> float:
    """Speed-up over plain decoding with the best draft length: S = E / (g c + v), E = (1 - a^(g+1)) / (1 - a).

    `agreement` a is the chance that a drafted token is the target's, `cost` c a draft step over a plain step; a
    verify pass of g + 1 rows takes v = 1 + 0.04 g plain steps (Leviathan et al., arXiv 2211.17192, with v).
    """
    best, tokens = 1.0, 1.0
    for length in range(1, _LONGEST + 1):
        tokens += agreement**length
        best = max(best, tokens / (length * cost + 1 + _ROW * length))
    return best


def search(
    program: Program, entry: Entry, texts: Sequence[Sequence[int]], gain: float
) -> Generator[Progress, None, Found]:
    """Leave out one layer after the other, each time the one without which the predicted speed-up is highest.

    1. That ends where the speed-up no longer grows. It is done on one half of the texts; of what was left out by
       then, as much goes as is best on the other half. The best of many trials on one text owes its figures to
       chance: on SmolLM2 the search half had 0.73 without two layers, against 0.71 with all, and other texts 0.69
       against 0.74.
    2. Unless that gains the share `gain` on the other half, no layer goes.
    3. Costs are bytes of the matrices that a step reads. Agreement is that of the draft's choice after each token of
       the texts, which both are given, with the target's; first tokens aside, after which nothing is ever drafted.
    """
    searched, confirming = _halves(texts)
    path = yield from _path(_Judge(program, entry, searched))
    judge = _Judge(program, entry, confirming)
    complete = judge.complete
    best = max((judge.without(layers) for layers in path), key=lambda trial: trial.speedup)
    without = f"without {', '.join(map(str, sorted(best.layers)))}"
    if best.speedup >= complete.speedup * (1 + gain):
        return Found(sorted(best.layers), f"{without}, {best}; with all layers, {complete}")
    return Found(
        [],
        f"no layer can go for a gain of {gain:.1%}: with all, {complete}; {without}, the best to go, {best}",
    )


class _Judge:
    """Tries an entry without layers on texts of which the target's choices are known."""

    def __init__(self, program: Program, entry: Entry, texts: Sequence[Sequence[int]]) -> None:
        known = known_to(entry, [list(text) for text in texts])
        texts = [text[: len(same)] for text, same in zip(texts, known, strict=True)]
        target = Replay(program, program.target, texts)
        self._wanted = target.logits().argmax(-1)
        self._counts = torch.cat([torch.arange(len(text)) for text in texts]) > 0
        self._draft = Replay(program, entry, known, target.held)
        self._blocks = residual_blocks(entry)
        whole = _bytes(program, program.target.graph.nodes)
        self._cost = _bytes(program, entry.graph.nodes) / whole
        self._costs = [_bytes(program, block.nodes) / whole for block in self._blocks.layers]
        self.layers = range(len(self._costs))
        self.begin = self._draft.before(self._blocks)
        self.complete = self.without(frozenset())

    def without(self, skipped: frozenset[int], hidden: torch.Tensor | None = None, first: int = 0) -> Trial:
        """Try the entry without layers, from what goes into layer `first` on."""
        hidden = self.begin if hidden is None else hidden
        for layer in self.layers[first:]:
            if layer not in skipped:
                hidden = self.through(layer, hidden)
        right = self._draft.after(self._blocks, hidden).argmax(-1) == self._wanted
        cost = self._cost - sum(self._costs[layer] for layer in skipped)
        return Trial(skipped, right[self._counts].double().mean().item(), cost)

    def through(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a layer makes of what goes into it."""
        return self._draft.layer(self._blocks.layers[layer], hidden)


def _path(judge: _Judge) -> Generator[Progress, None, list[frozenset[int]]]:
    """Return the sets of layers to leave out one after the other, at least one."""
    path: list[frozenset[int]] = []
    current = judge.complete
    while len(current.layers) < len(judge.layers) - 1:
        trials, hidden = [], judge.begin
        left = [layer for layer in judge.layers if layer not in current.layers]
        for count, layer in enumerate(left):
            yield Progress(f"trying drafts without {len(path) + 1} layers", count, len(left))
            trials.append(judge.without(current.layers | {layer}, hidden, layer + 1))
            hidden = judge.through(layer, hidden)
        best = max(trials, key=lambda trial: trial.speedup)
        if path and best.speedup <= current.speedup:
            break
        path.append(best.layers)
        if best.speedup <= current.speedup:
            break
        current = best
    return path


def _halves(texts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Share texts out in turn; a single one is cut."""
    if len(texts) == 1:
        middle = len(texts[0]) // 2
        texts = texts[0][:middle], texts[0][middle:]
    return list(texts[::2]), list(texts[1::2])


def _bytes(program: Program, nodes: Sequence[fx.Node]) -> int:
    """Bytes of the matrices that a step reads, all but those of which it reads a few rows."""
    total = 0
    for node in nodes:
        if calls(node, *LINEARS):
            stored = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
            if calls(node, ops.linear_refined):
                stored.remove(node.args[4])
            total += sum(program.weights[str(a.target)].nbytes for a in stored)
    return total

"""sparsify: set weights of convolutions and linears to zero."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, fx

from specqd.errors import InputError
from specqd.passes.contract import Note, Pass, Progress, Refusal
from specqd.passes.quantize.error_compensation import inverse_factor
from specqd.program import Entry, Program

from .allocation import Allocation, allocate
from .calibration_data import Data, Pixels, Samples
from .layers import NOT_FINITE, Layer, left_out, parted, prunable, store
from .layerwise import layerwise
from .pattern import Pattern, keep_n_of_m, smallest, smallest_of_rows
from .sensitivity import errors_at_levels, units_of_least_error
from .sparsegpt import sparsegpt

__all__ = ["Sparsify"]

_TOLERANCE = 0.005
_DAMPING = 0.01  # of SparseGPT, a share of the Gram matrix's mean diagonal


class Sparsify(Pass):
    """Set a share of the weights of convolutions and linears to zero.

        conv(x, w, b), linear(x, w, b)  ->  the same, w with zeros

    Which layer gets how many zeros is said by `allocation` (specqd.passes.prune.allocation; for `sensitivity`, by what
    they do to outputs, specqd.passes.prune.sensitivity), which weights of a layer by `method`:

    1. `magnitude`: those that are smallest. Nothing else is needed (Lazarevich et al., arXiv 2104.15023).
    2. `wanda`: those with the smallest |w| times the L2 norm of its input on the data, as many in each output channel
       (Sun et al., arXiv 2306.11695).
    3. `sparsegpt`: those that matter least if later columns make good for them, which they do (Frantar and Alistarh,
       arXiv 2301.00774).

    Inputs are those of the dense model. A weight that several products read is pruned once. N of M weights, or a
    block's columns, are neighbours along the input channels, at the same position of a kernel. The dense weights stay
    with the program, for `calibrate`.

    Refused: layers that `ignore` names, that do not fit the pattern, whose weight is computed, shared with another kind
    of operator, quantised, or not finite; transposed convolutions; where data are used, inputs that are not finite.

    Attributes:
        sparsity: share of zeros in all layers together that are not refused, from 0 up to but not including 1; with a
            pattern N:M it is 1 - N/M instead.
        method: which weights of a layer go.
        allocation: how many go in which layer.
        pattern: `any`, N:M such as 2:4 (N of M neighbours stay), or blocks of output x input channels such as 16x1.
        ignore: shell-style patterns of weight names to leave dense; each must match one.
        data: for wanda, sparsegpt and allocation=sensitivity, what goes into the model.
        samples: how many images, or texts of up to 512 tokens, to take of the data.
        pixels: what the model takes for a pixel's 0 to 255.
        seed: chooses the data.
    """

    name = "sparsify"
    sparsity: float = 0.65
    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    allocation: Allocation = "normalised"
    pattern: str = "any"
    ignore: tuple[str, ...] = ()
    data: Data = Data()
    samples: int = 300
    pixels: Pixels = "imagenet"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        Pattern.parse(self.pattern)
        if not 0 <= self.sparsity < 1:
            raise InputError(
                f"{self.name}: a sparsity of {self.sparsity} is out of range; give 0 or more, less than 1"
            )

    @property
    def lossless(self) -> bool:
        """Zeros change what the model computes."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Note | Progress]:
        """Prune each layer, say how much of it, and why not for the rest."""
        pattern = Pattern.parse(self.pattern)
        layers, refused = parted(prunable(program, entry, self.ignore), partial(_unfit, pattern))
        pruned = (yield from self._pruned(program, entry, layers, pattern)) if layers else {}
        refused += [Refusal(layer.name, NOT_FINITE) for layer in layers if layer not in pruned]
        yield from refused
        zeros = total = 0
        for layer in (layer for layer in layers if layer in pruned):
            old, new = (
                program.weights[layer.weight],
                layer.restored(pruned[layer], program.weights[layer.weight].dtype),
            )
            gone = int((new == 0).sum())
            zeros, total = zeros + gone, total + new.numel()
            yield Note(
                layer.name,
                f"{gone / new.numel():.1%} of the {new.numel():,} weights of {layer.weight} are zero",
            )
            if not torch.equal(old, new):
                store(program, entry, layer, layer.weight, new)
                yield layer.nodes[0]
        target = 1 - pattern.kept / pattern.of if pattern.kept else self.sparsity
        yield Note("", self._total(zeros, total, target) + left_out(refused))

    def _total(self, zeros: int, total: int, target: float) -> str:
        reached = zeros / max(total, 1)
        if total and abs(reached - target) > _TOLERANCE:
            raise InputError(
                f"{self.name} reached a sparsity of {reached:.1%} where {target:.1%} was asked for, as zeros come in "
                "whole units and some weights may be zero already; give another sparsity, allocation or pattern"
            )
        return f"{reached:.1%} of the {total:,} weights of layers that can be pruned are zero"

    def _pruned(
        self, program: Program, entry: Entry, layers: list[Layer], pattern: Pattern
    ) -> Generator[Progress, None, dict[Layer, Tensor]]:
        """Return the pruned matrix of each layer, but of those whose input is not finite."""
        matrices = {layer: layer.matrix(program.weights[layer.weight].detach().float()) for layer in layers}
        counts = yield from self._counts(program, entry, matrices, pattern)
        if self.method == "magnitude":
            return {
                layer: _without(matrices[layer], matrices[layer] ** 2, counts[layer], pattern, by_row=False)
                for layer in counts
            }

        def solve(layer: Layer, gram: Tensor) -> dict[str, Tensor]:
            matrix, inputs = matrices[layer], gram[:, :-1, :-1]
            if self.method == "wanda":
                norms = inputs.diagonal(0, 1, 2).sqrt().float()
                return {
                    "matrix": _without(
                        matrix, matrix.abs() * norms[:, None], counts[layer], pattern, by_row=True
                    )
                }
            shares = _shares(counts[layer], layer.groups)
            parts = zip(matrix, inputs, shares, strict=True)
            return {"matrix": torch.stack([_sparsegpt(w, g, n, pattern) for w, g, n in parts])}

        samples = Samples(self.samples, self.seed, self.pixels)
        options = (self.method, self.pattern, [*counts.values()])
        solved = yield from layerwise(program, entry, list(counts), self.data, samples, solve, *options)
        return {layer: made["matrix"] for layer, made in solved.items()}

    def _counts(
        self, program: Program, entry: Entry, matrices: dict[Layer, Tensor], pattern: Pattern
    ) -> Generator[Progress, None, dict[Layer, int]]:
        """Return how many units of each layer to prune, without layers of which that cannot be found out."""
        if pattern.kept:
            return dict.fromkeys(matrices, 0)
        if self.allocation != "sensitivity":
            magnitudes = [pattern.units(matrix**2).sqrt() for matrix in matrices.values()]
            shapes = [tuple(layer.shape) for layer in matrices]
            counts = allocate(self.allocation, self.sparsity, magnitudes, shapes)
            return dict(zip(matrices, counts, strict=True))

        # Of the dense weights, so that a sparser level, or the same one again, keeps the zeros there are.
        def search(layer: Layer, gram: Tensor) -> dict[str, Tensor]:
            weight = program.dense.get(layer.weight, program.weights[layer.weight])
            matrix = layer.matrix(weight.detach().float())
            return {"errors": errors_at_levels(matrix, matrix**2, gram, pattern)}

        samples = Samples(self.samples, self.seed, self.pixels)
        found = yield from layerwise(
            program, entry, list(matrices), self.data, samples, search, "levels", self.pattern
        )
        layers = [layer for layer in matrices if layer in found]
        sizes = [pattern.units(matrices[layer]).numel() for layer in layers]
        counts = units_of_least_error(self.sparsity, sizes, [found[layer]["errors"] for layer in layers])
        return dict(zip(layers, counts, strict=True))


def _unfit(pattern: Pattern, layer: Layer) -> str | None:
    why = pattern.fault(layer.shape[0] // layer.groups, layer.shape[1])
    return f"{why}, so {layer.weight} cannot have the pattern" if why else None


def _without(matrix: Tensor, scores: Tensor, count: int, pattern: Pattern, by_row: bool) -> Tensor:
    if pattern.kept:
        return matrix.masked_fill(keep_n_of_m(scores, pattern), 0)
    choose = smallest_of_rows if by_row else smallest
    return matrix.masked_fill(pattern.spread(choose(pattern.units(scores), count)), 0)


def _shares(count: int, groups: int) -> list[int]:
    ends = [round(count * at / groups) for at in range(groups + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def _sparsegpt(matrix: Tensor, gram: Tensor, count: int, pattern: Pattern) -> Tensor:
    factor = inverse_factor(gram, _DAMPING)
    # Weights of an input that is always zero do nothing: this lets them be the first to go.
    factor.diagonal()[gram.diagonal() == 0] = 1e6
    return sparsegpt(matrix, factor, count, pattern)

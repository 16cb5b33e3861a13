"""calibrate: change the weights that pruning left, so that each layer's output is again what it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, fx

from specqd.errors import InputError
from specqd.passes.contract import Note, Pass, Progress, Refusal
from specqd.program import Entry, Program

from .calibration_data import Data, Pixels, Samples
from .layers import NOT_FINITE, Layer, left_out, parted, prunable, store, treated
from .layerwise import layerwise
from .least_squares import adam, corrected, output_error, solve

__all__ = ["Calibrate"]


#: what is tried of damping, and which batches are left out for that
_DAMPINGS, _APART = (0.1, 1.0, 10.0), 5


class Calibrate(Pass):
    """Change the weights that `sparsify` left, and biases, so that each layer's outputs are near the dense model's.

        conv(x, w, b), linear(x, w, b)  ->  the same, w with the same zeros

    Layer by layer, for the inputs of the dense model (Lazarevich et al., arXiv 2104.15023):

    1. `correct`: each output channel's weights get their deviation back, and in part their mean; then biases give the
       outputs their mean.
    2. `adam`: these, then steps of Adam on the mean squared error, with the paper's rates.
    3. `closed`: the solution of that least squares problem itself, by conjugate gradients, with a price on what it is
       away from 1, which decides what the data leave open. Images that are few or alike, or not
       like those to come, leave much open.

    Layers without a bias get none. A result that is worse than what was there is dropped. What is solved is kept in the
    cache folder for a month, so that a calibration which was broken off goes on where it was.

    Refused: layers that were not sparsified or have been calibrated since, or whose input is not finite.

    Attributes:
        data: what goes into the model.
        samples: how many images, or texts of up to 512 tokens, to take of the data.
        method: see above.
        steps: of adam.
        damping: of closed, that price: as though each input had been seen alone, with this share of the inputs' mean
            square. 0: each layer takes what leaves the least error on a fifth of the data, which were left out.
        pixels: what the model takes for a pixel's 0 to 255.
        seed: chooses the data.
    """

    name = "calibrate"
    data: Data = Data()
    samples: int = 300
    method: Literal["closed", "adam", "correct"] = "closed"
    steps: int = 1200
    damping: float = 0.0
    pixels: Pixels = "imagenet"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 0 <= self.damping < float("inf"):
            raise InputError(
                f"{self.name}: a damping of {self.damping} cannot be used; give more than 0, such as 0.1, or 0 to have "
                "it chosen"
            )
        if self.steps < 1:
            raise InputError(f"{self.name}: {self.steps} steps are too few; give 1 or more")

    @property
    def lossless(self) -> bool:
        """Other weights give other outputs."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Note | Progress]:
        """Calibrate each layer, say how much nearer its output is, and why not for the rest."""

        def unfit(layer: Layer) -> str | None:
            if layer.weight not in program.dense:
                return f"{layer.weight} was not sparsified"
            done = treated(program, entry, layer, self.name, "distil")
            return f"{layer.weight} is calibrated already" if done else None

        layers, refused = parted(prunable(program, entry), unfit)

        def improved(layer: Layer, *sums: Tensor) -> dict[str, Tensor]:
            return self._improved(program, layer, *sums)

        samples = Samples(self.samples, self.seed, self.pixels)
        options = (self.method, self.steps, self.damping)
        apart = _APART if self.method == "closed" and not self.damping else 0
        solved = (
            (
                yield from layerwise(
                    program, entry, layers, self.data, samples, improved, *options, apart=apart
                )
            )
            if layers
            else {}
        )
        refused += [Refusal(layer.name, NOT_FINITE) for layer in layers if layer not in solved]
        yield from refused
        yield Note("", f"layers calibrated: {len(solved)}{left_out(refused)}")
        for layer in (layer for layer in layers if layer in solved):
            before, after = solved[layer]["errors"].tolist()
            yield Note(
                layer.name, f"its output's squared error went from {before:.2%} of the output to {after:.2%}"
            )
            if after < before:
                _replace(program, entry, layer, solved[layer]["matrix"])
                yield layer.nodes[0]

    def _improved(self, program: Program, layer: Layer, *sums: Tensor) -> dict[str, Tensor]:
        dense, pruned = (
            _with_bias(weights, layer) for weights in (program.weights | program.dense, program.weights)
        )
        support, gram = pruned != 0, torch.stack(sums).sum(0)
        support[..., -1] = layer.bias is not None
        result = corrected(dense, pruned, support, gram)
        if self.method == "closed":
            damping = self.damping or _chosen(dense, pruned, support, sums)
            result = solve(dense, result, support, gram, damping)
        elif self.method == "adam":
            result = adam(dense, result, support, gram, self.steps)
        stored = result.to(program.weights[layer.weight].dtype).double()
        whole = torch.stack([output_error(w - dense, gram) for w in (pruned, stored)])
        return {"matrix": result, "errors": whole / output_error(dense, gram).clamp_min(1e-300)}


def _chosen(dense: Tensor, pruned: Tensor, support: Tensor, sums: tuple[Tensor, ...]) -> float:
    """Return the damping with which what is solved for the first Gram matrix errs least by the second."""
    if len(sums) < 2:
        return _DAMPINGS[0]
    fitted, unseen = sums
    near = corrected(dense, pruned, support, fitted)

    def error(damping: float) -> float:
        return float(output_error(solve(dense, near, support, fitted, damping) - dense, unseen))

    return min(_DAMPINGS, key=error)


def _with_bias(weights: dict[str, Tensor], layer: Layer) -> Tensor:
    """Return a layer's matrix with the biases as a last column, or zeros where it has none; float64."""
    matrix = layer.matrix(weights[layer.weight].detach().double())
    bias = None if layer.bias is None else weights[layer.bias].detach().double()
    column = matrix.new_zeros(matrix.shape[:2]) if bias is None else bias.reshape(matrix.shape[:2])
    return torch.cat([matrix, column.double()[..., None]], -1)


def _replace(program: Program, entry: Entry, layer: Layer, matrix: Tensor) -> None:
    dtype, bias = program.weights[layer.weight].dtype, layer.bias
    store(program, entry, layer, layer.weight, layer.restored(matrix[..., :-1], dtype))
    if bias is not None:
        store(program, entry, layer, bias, matrix[..., -1].flatten().to(program.weights[bias].dtype))

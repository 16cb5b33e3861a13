"""distil: train the weights that pruning left, of all layers together, so that outputs are again what they were."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import fx

from specqd.errors import InputError
from specqd.passes.contract import Note, Pass, Progress, Refusal
from specqd.program import Entry, Program

from .calibration_data import Data, Pixels, Samples
from .layers import Layer, left_out, parted, prunable, store, treated
from .training import Training

__all__ = ["Distil"]


class Distil(Pass):
    """Train the weights that `sparsify` left, and biases, so that the outputs of all layers are near the dense model's.

        conv(x, w, b), linear(x, w, b)  ->  the same, w with the same zeros

    `calibrate` solves for one layer at a time, whose inputs are the dense model's; what layers leave then adds up. Here
    the pruned model runs as a whole, and each layer makes good for those before it:

    1. The loss is the mean, over the layers, of the squared error of a layer's output by the variance of the dense
       model's output, each model on its own inputs (hints of Romero et al., arXiv 1412.6550, in every layer).
    2. Adam takes a step for each batch; its rate falls from `rate` to zero as a cosine does. Zeros stay zero.

    All samples are kept in memory. What is trained is kept in the cache folder after each epoch, for a month, so that a
    run which was broken off goes on where it was.

    Refused: layers that were not sparsified or have been distilled since; language models, whose caches have no
    derivatives.

    Attributes:
        data: what goes into both models.
        samples: how many images to take of the data.
        epochs: how often each is seen.
        rate: of learning, at the start.
        augment: change images each time they are seen, so that few stand for more (specqd.passes.prune.augmentation).
        pixels: what the model takes for a pixel's 0 to 255.
        seed: chooses the data, their order, and how they are changed.
    """

    name = "distil"
    data: Data = Data()
    samples: int = 300
    epochs: int = 20
    rate: float = 3e-4
    augment: bool = False
    pixels: Pixels = "imagenet"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.epochs < 1:
            raise InputError(f"{self.name}: {self.epochs} epochs are too few; give 1 or more")
        if not 0 < self.rate < 1:
            raise InputError(
                f"{self.name}: a rate of {self.rate} cannot be used; give more than 0, such as 3e-4"
            )

    @property
    def lossless(self) -> bool:
        """Other weights give other outputs."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Note | Progress]:
        """Train, say how much nearer the outputs are, and why not for the rest."""
        layers, refused = parted(prunable(program, entry), partial(_unsuitable, program, entry))
        if not layers:
            yield from refused
            yield Note("", f"layers distilled: 0{left_out(refused)}")
            return
        samples = Samples(self.samples, self.seed, self.pixels)
        batches = list(self.data.batches(program, entry, samples))
        training = Training(program, entry, layers, self.epochs, self.rate)
        augment = self.augment and all(x.dim() == 4 and x.is_floating_point() for x in batches[0])
        yield from training.run(batches, augment, self.seed, self.data.fingerprint(samples), samples)
        if not all(weight.isfinite().all() for weight in training.weights.values()):
            raise InputError(
                f"{self.name}: weights became NaN or infinite; give a rate below {self.rate}, or data without those"
            )
        yield from refused
        first, last = training.losses[0], training.losses[-1]
        yield Note(
            "",
            f"layers distilled: {len(layers)}; the squared error of their outputs went from {first:.2%} of the "
            f"variance, over the first epoch, to {last:.2%}{left_out(refused)}",
        )
        for layer in layers:
            for name in filter(None, (layer.weight, layer.bias)):
                new = training.weights[name].detach().to(program.weights[name].dtype)
                store(program, entry, layer, name, new)
            yield layer.nodes[0]


def _unsuitable(program: Program, entry: Entry, layer: Layer) -> str | None:
    if entry.of_language_model:
        return "the caches of a language model have no derivatives; calibrate it"
    if layer.weight not in program.dense:
        return f"{layer.weight} was not sparsified"
    return f"{layer.weight} is distilled already" if treated(program, entry, layer, Distil.name) else None

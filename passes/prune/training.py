"""Trains the weights of pruned layers together, so that their outputs are near those of the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from specqd.passes.contract import Progress
from specqd.passes.quantize.calibration_store import Store, fingerprint
from specqd.program import Entry, Program
from specqd.reference import Interpreter

from .augmentation import augmented
from .layers import Layer

__all__ = ["Training"]


class Training:
    """Adam on the mean, over layers, of the squared error of a layer's outputs by the variance of the dense ones.

    Attributes:
        weights: what is trained by name, float32: the layers' weights and biases.
        losses: the mean loss of each epoch.
    """

    def __init__(
        self, program: Program, entry: Entry, layers: Sequence[Layer], epochs: int, rate: float
    ) -> None:
        """Begin with the program's weights; the dense ones are `program.dense`."""
        self.program, self.entry, self.epochs, self.rate = program, entry, epochs, rate
        self.dense = program.copy()
        self.dense.weights |= program.dense
        self.nodes = {node for layer in layers for node in layer.nodes}
        self.support = {layer.weight: program.weights[layer.weight] != 0 for layer in layers}
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.weights = {
            name: program.weights[name].detach().float().clone().requires_grad_()
            for name in [*self.support, *dict.fromkeys(biases)]
        }
        self.losses: list[float] = []

    def run(
        self, batches: Sequence[tuple[Tensor, ...]], augment: bool, seed: int, *content: object
    ) -> Iterator[Progress]:
        """Train on batches of samples, which each epoch puts together anew.

        Args:
            batches: values of the entry's placeholders; each has samples at the first dimension.
            augment: change images each time, see specqd.passes.prune.augmentation.
            seed: of their order and changes.
            content: what the batches depend on, under which the state after each epoch is kept in the cache folder.
        """
        samples, size = [torch.cat(values) for values in zip(*batches, strict=True)], len(batches[0][0])
        optimiser = torch.optim.Adam(self.weights.values(), lr=self.rate)
        content = (*content, self.epochs, self.rate, augment, seed)
        names = [fingerprint(program, self.entry.name) for program in (self.program, self.dense)]
        store = Store.of(*names, *content, code=Path(__file__).parent)
        self._resume(store, optimiser)
        total = self.epochs * len(batches)
        for epoch in range(len(self.losses), self.epochs):
            generator = torch.Generator().manual_seed(seed << 32 | epoch)
            order = torch.randperm(len(samples[0]), generator=generator)
            loss = 0.0
            for number, chosen in enumerate(order.split(size)[: len(batches)], epoch * len(batches)):
                yield Progress("distilling", number, total)
                optimiser.param_groups[0]["lr"] = self.rate * (1 + math.cos(math.pi * number / total)) / 2
                batch = [sample[chosen.to(sample.device)] for sample in samples]
                loss += self._step(optimiser, [augmented(x, generator) for x in batch] if augment else batch)
            self.losses.append(loss / len(batches))
            store.put("state", self._state(optimiser))

    def _step(self, optimiser: torch.optim.Optimizer, batch: Sequence[Tensor]) -> float:
        given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in batch]
        with torch.no_grad():
            wanted = _outputs(self.dense, self.entry, self.nodes, given)
        pruned = self.program.copy()
        pruned.weights |= {name: w.to(pruned.weights[name].dtype) for name, w in self.weights.items()}
        with torch.enable_grad():
            found = _outputs(pruned, self.entry, self.nodes, given)
            errors = [
                F.mse_loss(found[node].float(), wanted[node].float())
                / wanted[node].float().var(correction=0).clamp_min(1e-30)
                for node in found
            ]
            loss = torch.stack(errors).mean()
            optimiser.zero_grad()
            loss.backward()
        for name, kept in self.support.items():
            self.weights[name].grad.mul_(kept)  # type: ignore[union-attr]
        optimiser.step()
        return float(loss.detach())

    def _state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        moments = {
            f"{name}/{key}": value
            for name, weight in self.weights.items()
            for key, value in optimiser.state[weight].items()
        }
        trained = {name: weight.detach() for name, weight in self.weights.items()}
        return {**trained, **moments, "/losses": torch.tensor(self.losses, dtype=torch.float64)}

    def _resume(self, store: Store, optimiser: torch.optim.Optimizer) -> None:
        """Go on from the last epoch that was kept, if any."""
        state = store.get("state")
        if state is None:
            return
        self.losses = state["/losses"].tolist()
        for name, weight in self.weights.items():
            weight.data.copy_(state[name])
            kept = {
                key.rpartition("/")[2]: value
                for key, value in state.items()
                if key.rpartition("/")[0] == name
            }
            optimiser.state[weight] = {
                key: value if key == "step" else value.to(weight.device) for key, value in kept.items()
            }


def _outputs(
    program: Program, entry: Entry, nodes: set[fx.Node], batch: Sequence[Tensor]
) -> dict[fx.Node, Tensor]:
    """Run an entry, and return what `nodes` compute."""
    found: dict[fx.Node, Tensor] = {}

    class Watcher(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in nodes:
                found[n] = value
            return value

    Watcher(program, entry).run(*batch)
    return found

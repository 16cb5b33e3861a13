"""A detector of one network: raw audio to score in one module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .lcnn import LCNN, LCNNGRU
from .spectra import ConstantQ, Fourier, fit, normalised

__all__ = ["NETWORKS", "Detector", "network", "read_pcm"]


class FirstFrames(nn.Module):
    """The constant-Q transform of what its first 400 frames see."""

    def __init__(self, frames: int = 400) -> None:
        """Make the transform."""
        super().__init__()
        self.transform = ConstantQ()
        self.samples = (frames - 1) * self.transform.hop

    def forward(self, x: Tensor) -> Tensor:
        """Return `[864, 400]` of audio `[time]`."""
        found: Tensor = self.transform(fit(x, self.samples))
        return found


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "lcnn": (Fourier, LCNN),
    "lcnn-gru": (Fourier, LCNNGRU),
    "lcnn-cqt": (FirstFrames, LCNN),
}
"""Name -> front end and network."""


class Detector(nn.Module):
    """A front end and a network: audio `[time]`, float32 in [-1, 1], to a score that is higher for genuine speech."""

    def __init__(self, front: nn.Module, network: nn.Module) -> None:
        """Join them."""
        super().__init__()
        self.front, self.network = front, network

    def image(self, x: Tensor) -> Tensor:
        """Return what the network sees, `[1, 1, 864, 400]`."""
        return normalised(self.front(x))[None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithm of the odds, `[]`."""
        logits = self.network(self.image(x))[0]
        return logits[1] - logits[0]


def network(name: str) -> Detector:
    """Make a detector with random weights."""
    front, net = NETWORKS[name]
    return Detector(front(), net())


def read_pcm(paths: Iterable[Path]) -> list[Tensor]:
    """Read recordings of 16 bits at 16 kHz, as a corpus has them; float32 in [-1, 1]."""
    from scipy.io import wavfile

    return [torch.from_numpy(wavfile.read(path)[1].astype(np.float32) / 32768) for path in paths]

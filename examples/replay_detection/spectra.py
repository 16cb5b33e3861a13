"""Spectrograms of raw audio at 16 kHz: logarithmic power of Fourier and constant-Q transforms, as torch modules."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["FLOOR", "HOP", "RATE", "ConstantQ", "Fourier", "fit", "normalised"]

RATE = 16_000
#: samples between frames of `Fourier`
HOP = 130
#: added to powers before their logarithm; 16-bit audio has a rounding error of some 1e-10 of full scale
FLOOR = 1e-10


def fit(x: Tensor, samples: int) -> Tensor:
    """Cut audio `[time]` to `samples`; repeat it where it is shorter (section 3.1: unified by the first frames)."""
    return x[torch.arange(samples, device=x.device) % x.shape[0]]


def normalised(x: Tensor) -> Tensor:
    """Give each frequency of a spectrogram `[bins, frames]` the mean 0 and the variance 1."""
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Fourier(nn.Module):
    """The first 400 frames of the log power spectrum: 1724 samples under a Blackman window, each 130 samples.

    Input: audio `[time]`, float32 in [-1, 1]. Output `[864, 400]`: the bins of 1728 points but the last.
    """

    def __init__(self, points: int = 1728, window: int = 1724, hop: int = HOP, frames: int = 400) -> None:
        """Make the window."""
        super().__init__()
        self.points, self.hop = points, hop
        self.samples = (frames - 1) * hop + points
        self.register_buffer("window", torch.blackman_window(window, periodic=False), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        x = fit(x, self.samples)
        found = torch.stft(
            x, self.points, self.hop, len(self.window), self.window, center=False, return_complex=True
        )
        parts = torch.view_as_real(found[: self.points // 2])
        return (parts.square().sum(-1) + FLOOR).log()


class ConstantQ(nn.Module):
    """Log power of a transform of 9 octaves up to 8 kHz, 96 bins each; windows of low bins are cut to some 0.3 s.

    The constants are those of CQCC (Todisco et al., Odyssey 2016): bandwidths are a Q-th of the frequency plus a
    constant, as in Schoerkhuber's toolbox. Input: audio `[time]`; output `[864, time // hop + 1]`, frames centred at
    each `hop`-th sample.
    """

    def __init__(self, hop: int = 128, octaves: int = 9, bins: int = 96) -> None:
        """Make the windows, octave by octave: those of an octave are padded to one length."""
        super().__init__()
        self.hop = hop
        step = 2 ** (1 / bins)
        lowest = RATE / 2 / 2**octaves
        self.hertz = lowest * step ** np.arange(octaves * bins)
        gamma = 228.7 * (step**0.5 - step**-0.5)
        lengths = RATE / (self.hertz * (step**0.5 - step**-0.5) + gamma)
        self.octaves = octaves
        for at in range(octaves):
            of = slice(at * bins, (at + 1) * bins)
            table = _wavelets(self.hertz[of], lengths[of])
            self.register_buffer(f"octave_{at}", torch.from_numpy(table), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        frames = x.shape[0] // self.hop + 1
        found = []
        for at in range(self.octaves):
            table = self.get_buffer(f"octave_{at}")  # [length, 2 * bins]
            half = table.shape[0] // 2
            padded = nn.functional.pad(x, (half, half + self.hop))
            parts = padded.unfold(0, table.shape[0], self.hop)[:frames] @ table
            real, imaginary = parts.chunk(2, 1)
            found.append(real.square() + imaginary.square())
        return (torch.cat(found, 1) + FLOOR).log().T


def _wavelets(hertz: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return windowed waves float32 `[length, 2 * bins]`, real parts then imaginary ones: Hann windows of the sum 1."""
    length = 2 * math.ceil(lengths.max() / 2)
    times = np.arange(length) - length // 2
    inside = np.abs(times[:, None]) < lengths / 2
    window = np.where(inside, 0.5 + 0.5 * np.cos(2 * np.pi * times[:, None] / lengths), 0)
    waves = window / window.sum(0) * np.exp(-2j * np.pi * times[:, None] * hertz / RATE)
    return np.concatenate([waves.real, waves.imag], 1).astype(np.float32)

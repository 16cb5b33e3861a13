"""Cepstra of raw audio at 16 kHz, as torch modules: of linear filters, of linear prediction, of a constant-Q transform.

Each gives `[frames, coefficients]` of audio `[time]`. Their tables are made with numpy and scipy when a module is made.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .spectra import FLOOR, RATE, ConstantQ

__all__ = ["CQCC", "LFCC", "LPCC", "Deltas", "dct"]


def dct(count: int, length: int) -> np.ndarray:
    """Return the first rows of the orthonormal DCT-II, `[count, length]`."""
    angles = np.pi / length * np.outer(np.arange(count), np.arange(length) + 0.5)
    table = np.cos(angles) * math.sqrt(2 / length)
    table[0] /= math.sqrt(2)
    return table


class Deltas(nn.Module):
    """Join coefficients `[frames, n]` with their slopes over 2 * reach + 1 frames, and the slopes of those.

    The result is `[frames, 3 * n]`; the ends are repeated (`Deltas` of the ASVspoof baselines).
    """

    def __init__(self, reach: int = 3) -> None:
        """Say how many frames on either side count."""
        super().__init__()
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        """Join."""
        first = self._slopes(x)
        return torch.cat([x, first, self._slopes(first)], 1)

    def _slopes(self, x: Tensor) -> Tensor:
        n, frames = self.reach, x.shape[0]
        at = torch.arange(-n, frames + n, device=x.device).clamp(0).minimum(torch.tensor(frames - 1))
        x = x[at]
        total: Tensor = sum(k * (x[n + k :][:frames] - x[n - k :][:frames]) for k in range(1, n + 1))  # type: ignore[assignment]
        return total / (2 * sum(k * k for k in range(1, n + 1)))


class LFCC(nn.Module):
    """Cepstra of 20 even triangular filters up to 8 kHz: frames of 20 ms, each 10 ms (Sahidullah et al., 2015)."""

    def __init__(
        self, count: int = 20, filters: int = 20, points: int = 512, window: int = 320, hop: int = 160
    ) -> None:
        """Make the filters and their DCT."""
        super().__init__()
        self.points, self.hop = points, hop
        edges = np.linspace(0, RATE / 2, filters + 2)
        hertz = np.arange(points // 2 + 1) * RATE / points
        rise = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
        fall = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
        self.register_buffer("filters", _float(np.clip(np.minimum(rise, fall), 0, None)), persistent=False)
        self.register_buffer("cosines", _float(dct(count, filters).T), persistent=False)
        self.register_buffer("window", torch.hann_window(window, periodic=False), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        found = torch.fft.rfft(x.unfold(0, len(self.window), self.hop) * self.window, self.points)
        power = torch.view_as_real(found).square().sum(-1)
        return (power @ self.filters + FLOOR).log() @ self.cosines


class LPCC(nn.Module):
    """Cepstra of linear prediction by the autocorrelation method: frames of 25 ms under a Hamming window, each 10 ms.

    The recursions of Levinson and Durbin and of Atal (1974): c_n = a_n + sum_k (k / n) c_k a_(n-k).
    """

    def __init__(self, order: int = 20, window: int = 400, hop: int = 160) -> None:
        """Make the window."""
        super().__init__()
        self.order, self.hop = order, hop
        self.register_buffer("window", torch.hamming_window(window, periodic=False), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Predict, and turn what predicts into cepstra."""
        frames = x.unfold(0, len(self.window), self.hop) * self.window
        padded = nn.functional.pad(frames, (0, self.order))
        length = len(self.window)
        shifted = torch.stack([padded[:, k : k + length] for k in range(self.order + 1)], 1)
        correlation = (shifted @ frames[:, :, None])[:, :, 0]
        # Frames of digital silence, and predictions that rounding makes perfect, would divide by 0.
        energy = correlation[:, :1] * (1 + 1e-6) + FLOOR
        return self._cepstra(self._predictors(correlation, energy))

    def _predictors(self, correlation: Tensor, energy: Tensor) -> Tensor:
        """Return a `[frames, order]` of the prediction x_t = sum_k a_k x_(t-k)."""
        a = correlation[:, :0]
        for n in range(1, self.order + 1):
            ahead = (a * correlation[:, 1:n].flip(1)).sum(1, keepdim=True) if n > 1 else 0.0
            reflection = (correlation[:, n : n + 1] - ahead) / energy
            a = torch.cat([a - reflection * a.flip(1), reflection], 1)
            energy = energy * (1 - reflection * reflection)
        return a

    def _cepstra(self, a: Tensor) -> Tensor:
        found = a[:, :1]
        for n in range(2, self.order + 1):
            weights = torch.arange(1, n, device=a.device) / n
            rest = (found * weights * a[:, : n - 1].flip(1)).sum(1, keepdim=True)
            found = torch.cat([found, a[:, n - 1 : n] + rest], 1)
        return found


class CQCC(nn.Module):
    """Constant-Q cepstra (Todisco et al., Odyssey 2016): the DCT of log power, read at even steps of frequency.

    30 coefficients, the first of which is a mean. Reading by a cubic spline and the DCT are linear: one table.
    """

    def __init__(self, count: int = 30, steps: int = 16, hop: int = 128) -> None:
        """Make the table; `steps` are those within the lowest octave."""
        super().__init__()
        from scipy.interpolate import CubicSpline

        self.transform = ConstantQ(hop)
        hertz = self.transform.hertz
        even = np.arange(hertz[0], hertz[-1], hertz[0] / steps)
        read = CubicSpline(hertz, np.eye(len(hertz)))(even)  # [steps, bins]
        self.register_buffer("table", _float((dct(count, len(even)) @ read).T), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        return self.transform(x).T @ self.table


def _float(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))

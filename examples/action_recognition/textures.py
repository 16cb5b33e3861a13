"""Textures that tile, and outlines of objects; training and test have kinds of their own."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ANGLES", "SIDE", "Split", "outlines", "textures"]

Split = Literal["train", "test"]
SIDE = 128
ANGLES = 256
_BANK = 192


def textures(split: Split, generator: torch.Generator) -> Tensor:
    """Return float32 `[192, 3, 128, 128]` from 0 to 1: noise of some frequencies to train on, else cells and checks."""
    if split == "train":
        return torch.stack([_noise(generator) for _ in range(_BANK)])
    return torch.stack([(_cells, _checks)[at % 2](generator) for at in range(_BANK)])


def outlines(split: Split) -> Tensor:
    """Return the radius of objects by angle, float32 `[objects, 256]`, at most 1."""
    angle = torch.arange(ANGLES) * (2 * math.pi / ANGLES)
    if split == "train":
        found = [
            _polygon(angle, 3),
            _polygon(angle, 4),
            _polygon(angle, 6),
            _ellipse(angle, 0.55),
            _star(angle, 5),
        ]
    else:
        found = [
            _polygon(angle, 5),
            _star(angle, 3),
            _star(angle, 4),
            _ellipse(angle, 0.75),
            _cut_disk(angle),
        ]
    return torch.stack(found)


def _noise(generator: torch.Generator) -> Tensor:
    """Colours mixed by Gaussian noise around one frequency, of one direction or of all."""
    y, x = (torch.fft.fftfreq(SIDE)[:, None] * SIDE, torch.fft.fftfreq(SIDE)[None] * SIDE)
    frequency, turn, spread = (
        _uniform(generator, 2, 14),
        _uniform(generator, 0, math.pi),
        _uniform(generator, 0.15, 1.6),
    )
    radius = (torch.hypot(x, y) - frequency) / (0.35 * frequency)
    away = torch.sin(torch.atan2(y, x) - turn) / spread
    band = torch.exp(-(radius.square() + away.square()))
    waves = torch.fft.fft2(torch.randn(3, SIDE, SIDE, generator=generator)) * band
    waves = torch.fft.ifft2(waves).real
    waves = waves / waves.std((1, 2), keepdim=True)
    mixed = torch.einsum("ij,jyx->iyx", torch.randn(3, 3, generator=generator), waves)
    return torch.sigmoid(mixed + _base(generator))


def _cells(generator: torch.Generator) -> Tensor:
    """The nearest of some points, on a torus, gives a place its colour."""
    count = int(_uniform(generator, 8, 90))
    points, colours = (torch.rand(count, size, generator=generator) for size in (2, 3))
    at = torch.arange(SIDE) / SIDE
    along = [((at[:, None] - points[:, axis] + 0.5) % 1 - 0.5).square() for axis in (0, 1)]
    nearest = (along[0][:, None] + along[1][None]).argmin(-1)
    return colours[nearest].permute(2, 0, 1)


def _checks(generator: torch.Generator) -> Tensor:
    """Rectangles in two colours."""
    rows, columns = (2 * int(_uniform(generator, 1, 9)) for _ in range(2))
    at = torch.arange(SIDE) / SIDE
    odd = ((at * rows).long()[:, None] + (at * columns).long()[None]) % 2
    colours = torch.rand(2, 3, generator=generator)
    return colours[odd].permute(2, 0, 1)


def _polygon(angle: Tensor, sides: int) -> Tensor:
    step = 2 * math.pi / sides
    return math.cos(step / 2) / torch.cos(angle % step - step / 2)


def _star(angle: Tensor, points: int) -> Tensor:
    return 0.7 + 0.3 * torch.cos(points * angle)


def _ellipse(angle: Tensor, ratio: float) -> Tensor:
    return ratio / torch.sqrt((ratio * torch.cos(angle)).square() + torch.sin(angle).square())


def _cut_disk(angle: Tensor) -> Tensor:
    return torch.where(torch.cos(angle) > 0.3, 0.3 / torch.cos(angle).clamp(min=0.3), torch.ones_like(angle))


def _base(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 1, 1, generator=generator)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))

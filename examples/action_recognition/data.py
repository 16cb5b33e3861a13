"""Clips of a textured object that does one thing before a textured background; no single frame tells what.

Each kind of motion and its reverse show the same frames in another order. What differs between training and test is
what moves and before what (see textures.py); how it moves does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .textures import ANGLES, SIDE, Split, outlines, textures

__all__ = ["CLASSES", "FRAMES", "SIZE", "Clips", "normalised"]

CLASSES = (
    "left", "right", "up", "down", "clockwise", "counterclockwise", "growing", "shrinking", "bouncing",
    "vanishes, then inverts", "inverts, then vanishes",
)  # fmt: skip
FRAMES, SIZE = 16, 64
_NOISE = 4.0  # deviation of a pixel, of 255
_CONTRAST = 0.5  # of what is behind the object


def normalised(pixels: Tensor) -> Tensor:
    """Return what the models take for pixels uint8: float32 around 0."""
    return pixels.float() / 64 - 2


@dataclass
class _Motion:
    """Where an object is, how it is turned and how large, and 1 where it is there or inverted; all `[N, T]`."""

    x: Tensor
    y: Tensor
    angle: Tensor
    radius: Tensor
    there: Tensor
    inverted: Tensor


class Clips:
    """A source of clips, the same ones for the same seed, split and device."""

    def __init__(self, split: Split, seed: int, device: str = "cpu") -> None:
        """Make textures and objects."""
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.textures = textures(split, torch.Generator().manual_seed(0 if split == "train" else 1)).to(
            self.device
        )
        self.outlines = outlines(split).to(self.device)

    def batch(self, labels: Tensor) -> Tensor:
        """Return a clip uint8 `[N, 16, 3, 64, 64]` of each label, int64 `[N]`, with x to the right and y down."""
        count = len(labels)
        at = (torch.arange(SIZE, device=self.device) + 0.5) / SIZE * 2 - 1
        y, x = at[:, None].expand(SIZE, SIZE), at[None].expand(SIZE, SIZE)
        scene = self._textured(x.expand(count, 1, -1, -1), y.expand(count, 1, -1, -1))
        scene = 0.5 + _CONTRAST * (scene - 0.5)
        scene = self._drawn(scene.expand(-1, FRAMES, -1, -1, -1), self._motion(labels), x, y)
        noise = torch.randn(scene.shape, generator=self.generator, device=self.device)
        return (scene * 255 + _NOISE * noise).clamp(0, 255).round().to(torch.uint8)

    def _motion(self, labels: Tensor) -> _Motion:
        """Draw a motion for each label. Reverse motions are drawn alike and run backwards."""
        count = len(labels)
        time = torch.linspace(-1, 1, FRAMES, device=self.device)[None]

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, 1, generator=self.generator, device=self.device)

        def of(*names: str) -> Tensor:
            chosen = torch.tensor([CLASSES.index(name) for name in names], device=self.device)
            return torch.isin(labels, chosen).float()[:, None]

        x, y, far = uniform(-0.4, 0.4), uniform(-0.4, 0.4), uniform(0.25, 0.5)
        turn = uniform(-0.35, 0.35)
        there_and_back = 1 - 2 * (time - turn).abs() / (1 + turn.abs())
        heading = uniform(0, 2 * math.pi)
        bounce = of("bouncing") * far * there_and_back
        x = x + (of("right") - of("left")) * far * time + bounce * heading.cos()
        y = y + (of("down") - of("up")) * far * time + bounce * heading.sin()
        spin = of("clockwise") - of("counterclockwise")
        angle = uniform(0, 2 * math.pi) + spin * uniform(0.8, 1.6) * time
        growth = of("growing") - of("shrinking")
        radius = uniform(0.28, 0.42) * torch.exp(growth * uniform(0.25, 0.45) * time)
        first, gap, last = uniform(1, 5).floor(), uniform(3, 7).floor(), 3
        early, late = self._events(first, last), self._events(first + gap, last)
        forth, back = of("vanishes, then inverts"), of("inverts, then vanishes")
        there = 1 - forth * early - back * late
        return _Motion(
            x + 0 * time,
            y + 0 * time,
            angle + 0 * time,
            radius + 0 * time,
            there,
            forth * late + back * early,
        )

    def _events(self, begin: Tensor, length: int) -> Tensor:
        frame = torch.arange(FRAMES, device=self.device)[None]
        return ((frame >= begin) & (frame < begin + length)).float()

    def _drawn(self, scene: Tensor, motion: _Motion, x: Tensor, y: Tensor) -> Tensor:
        """Draw an object over a scene `[N, T, 3, H, W]`."""
        cos, sin, radius, there, inverted = (
            value[:, :, None, None]
            for value in (
                motion.angle.cos(),
                motion.angle.sin(),
                motion.radius,
                motion.there,
                motion.inverted,
            )
        )
        right, down = x - motion.x[:, :, None, None], y - motion.y[:, :, None, None]
        u, v = (right * cos + down * sin) / radius, (down * cos - right * sin) / radius
        chosen = self._choice(len(scene), len(self.outlines))[:, None, None, None]
        place = (torch.atan2(v, u) / (2 * math.pi) % 1 * ANGLES).long().clamp(max=ANGLES - 1)
        edge = (self.outlines[chosen, place] - torch.hypot(u, v)) * radius * SIZE / 2
        cover = (edge + 0.5).clamp(0, 1) * there
        lit = 0.5 + 0.5 * u.clamp(-1, 1)  # from one side, which turns with the object
        colour = 0.5 * self._textured(u * 0.4, v * 0.4) + 0.5 * lit[:, :, None]
        colour = torch.where(inverted[:, :, None] > 0, 1 - colour, colour)
        return scene + cover[:, :, None] * (colour - scene)

    def _textured(self, x: Tensor, y: Tensor) -> Tensor:
        """Return colours `[N, T, 3, H, W]` of a texture for each clip, at random scale and place."""
        count = len(x)
        scale, right, down = torch.rand(3, count, 1, 1, 1, generator=self.generator, device=self.device)
        scale = 0.15 + 0.35 * scale
        row, column = (
            ((z * scale + offset) % 1 * SIDE).long() % SIDE for z, offset in ((y, down), (x, right))
        )
        chosen = self._choice(count, len(self.textures))
        flat = self.textures[chosen].flatten(2)
        index = (row * SIDE + column).reshape(count, 1, -1).expand(-1, 3, -1)
        return flat.gather(2, index).unflatten(2, x.shape[1:]).transpose(1, 2)

    def _choice(self, count: int, of: int) -> Tensor:
        return torch.randint(of, (count,), generator=self.generator, device=self.device)

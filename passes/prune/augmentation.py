"""Images that differ more than those at hand: turned and scaled, coloured, and with parts of one in another.

A dense model says what should come of any image. So what one shows need not make sense, but layers should see as much
as they will of others. After random-resized crops, CutMix (Yun et al., arXiv 1905.04899) and mixup (Zhang et al., arXiv
1710.09412).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["augmented"]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change each image in another way; the same ones for the same state of the generator.

    1. It is turned by up to 30 degrees, flipped or not, and 0.4 to 1.1 of each side is seen.
    2. Each channel is scaled by 0.6 to 1.4 around the middle of the range, and shifted by up to 15 % of it; three in
       ten images have their channels exchanged.
    3. Half get a rectangle of another one, 0.2 to 0.7 of each side; three in ten are mixed with up to half of it.

    Args:
        images: float [B, C, H, W]; what comes of them stays in their range.
        generator: of the CPU, whatever device the images are on.
    """
    return _mixed(_coloured(_moved(images, generator), images.amin(), images.amax(), generator), generator)


def _uniform(
    low: float, high: float, shape: tuple[int, ...], like: Tensor, generator: torch.Generator
) -> Tensor:
    return (low + (high - low) * torch.rand(shape, generator=generator)).to(like)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    count = len(images)
    angle = _uniform(-math.pi / 6, math.pi / 6, (count,), images, generator)
    size = _uniform(0.4, 1.1, (count,), images, generator)
    flip = _uniform(-1, 1, (count,), images, generator).sign()
    place = _uniform(-1, 1, (count, 2), images, generator) * (1 - size).clamp_min(0)[:, None]
    cos, sin = size * angle.cos(), size * angle.sin()
    turn = torch.stack([flip * cos, -sin, place[:, 0], flip * sin, cos, place[:, 1]], 1).reshape(count, 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _coloured(images: Tensor, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    count, channels = images.shape[:2]
    order = torch.rand(count, channels, generator=generator).argsort(1)
    order[torch.rand(count, generator=generator) > 0.3] = torch.arange(channels)
    images = images.gather(1, order.to(images.device)[:, :, None, None].expand_as(images))
    scale = _uniform(0.6, 1.4, (count, channels, 1, 1), images, generator)
    shift = _uniform(-0.15, 0.15, (count, channels, 1, 1), images, generator) * (high - low)
    middle = (low + high) / 2
    return torch.minimum(torch.maximum((images - middle) * scale + middle + shift, low), high)


def _mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, *sides = images.shape
    others = images[torch.randperm(count, generator=generator).to(images.device)]
    cut = (torch.rand(count, generator=generator) < 0.5).to(images.device)[:, None]
    within = []
    for side in sides:
        at = torch.arange(side, device=images.device)
        middle = _uniform(0, side, (count, 1), images, generator)
        within.append((at - middle).abs() < side * _uniform(0.1, 0.35, (count, 1), images, generator))
    inside = (cut & within[0])[:, None, :, None] & within[1][:, None, None, :]
    share = _uniform(0, 0.5, (count, 1, 1, 1), images, generator)
    share = share * (torch.rand(count, 1, 1, 1, generator=generator) < 0.3).to(images.device)
    return torch.where(inside, others, torch.lerp(images, others, share))

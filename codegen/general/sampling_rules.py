"""Decompositions of what reads at places that are computed: grids in volumes, and windows at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAMPLING"]

aten = torch.ops.aten
_LINEAR, _NEAREST = 0, 1
_ZEROS, _BORDER = 0, 1


def _grid_sampler_3d(
    x: Tensor, grid: Tensor, interpolation: int = _LINEAR, padding: int = _ZEROS, align_corners: bool = False
) -> Tensor:
    """Read `x` [N, C, D, H, W] at `grid` [N, d, h, w, 3], whose last dimension is x, y, z from -1 to 1."""
    sizes = x.shape[2:]
    at = [
        _inside((coordinate + 1) * ((size - 1) / 2) if align_corners else ((coordinate + 1) * size - 1) / 2,
                size, padding, align_corners)
        for coordinate, size in zip(reversed(grid.unbind(-1)), sizes, strict=True)
    ]  # fmt: skip
    places = torch.arange(x.shape[0], device=x.device).reshape(-1, 1, 1, 1)
    corners = product((0, 1), repeat=3) if interpolation == _LINEAR else [(0, 0, 0)]
    total: Any = 0
    for corner in corners:
        weight, index = torch.ones_like(at[0]), []
        for place, size, more in zip(at, sizes, corner, strict=True):
            whole = place.floor() + more if interpolation == _LINEAR else place.round()
            if interpolation == _LINEAR:
                weight = weight * (1 - (place - whole).abs())
            weight = weight.where((whole >= 0) & (whole <= size - 1), 0.0)
            index.append(whole.clamp(0, size - 1).long())
        # Indexing beside the slice of channels puts those last.
        total = total + x.permute(0, 2, 3, 4, 1)[places, *index] * weight[..., None]
    return total.permute(0, 4, 1, 2, 3)


def _inside(place: Tensor, size: int, padding: int, align_corners: bool) -> Tensor:
    """Move places that lie outside, unless zeros are read there."""
    if padding == _ZEROS:
        return place
    if padding != _BORDER:
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(place)
        apart = (place - low).abs()
        rest, turns = torch.fmod(apart, span), (apart / span).floor()
        place = torch.where(torch.fmod(turns, 2) == 0, rest + low, span - rest + low)
    return place.clamp(0, size - 1)


def _fractional_max_pool(
    x: Tensor, kernel: Sequence[int], output: Sequence[int], samples: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest of each window and its place; `samples` [N, C, rank] say where windows begin.

    As in Graham, Fractional Max-Pooling (arXiv 1412.6071): distances of neighbouring windows differ by one. Samples of
    images begin with that of the width, those of volumes with that of the depth.
    """
    rank = len(kernel)
    rows = x.reshape(-1, *x.shape[-rank:])
    samples = samples.reshape(-1, rank).flip(-1) if rank == 2 else samples.reshape(-1, rank)
    at, shape = (
        [torch.arange(rows.shape[0], device=x.device).reshape(-1, *[1] * (2 * rank))],
        [-1] + [1] * (2 * rank),
    )
    flat: Any = 0
    for d, (n, out, window) in enumerate(zip(x.shape[-rank:], output, kernel, strict=True)):
        begin = _begins(samples[:, d, None], n, out, window)
        index = begin[:, :, None] + torch.arange(window, device=x.device)
        here = list(shape)
        here[1 + d], here[1 + rank + d] = out, window
        at.append(index.reshape(here))
        flat = flat * n + at[-1]
    windows = rows[tuple(at)].flatten(-rank)
    values, first = windows.max(-1)
    places = flat.expand(*windows.shape[:-1], *kernel).flatten(-rank).gather(-1, first[..., None]).squeeze(-1)
    whole = (*x.shape[:-rank], *output)
    return values.reshape(whole), places.reshape(whole)


def _begins(sample: Tensor, size: int, windows: int, width: int) -> Tensor:
    """Where each of the windows of a row begins: int64 `[rows, windows]` of samples `[rows, 1]` from 0 to 1."""
    last = torch.full_like(sample, size - width, dtype=torch.long)
    if windows == 1:
        return last
    step = (size - width) / (windows - 1)
    turn = torch.arange(windows - 1, device=sample.device)
    return torch.cat([((turn + sample) * step).long() - (sample * step).long(), last], 1)


SAMPLING: dict[Any, Callable[..., Any]] = {
    aten.grid_sampler_3d.default: _grid_sampler_3d,
    aten.fractional_max_pool2d.default: _fractional_max_pool,
    aten.fractional_max_pool3d.default: _fractional_max_pool,
}
"""Operator -> function of the same arguments in other operators of torch."""

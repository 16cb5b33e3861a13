"""Elements between elements: grids, regions and offsets that are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__: list[str] = []

_MODES = {
    "bilinear": "bilinear",
    "linear": "bilinear",
    "nearest": "nearest",
    "bicubic": "bicubic",
    "cubic": "bicubic",
}


@rule("GridSample")
def _grid_sample(
    node: Node,
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    if mode not in _MODES:
        raise CaptureError(f"{node}: there is no mode {mode!r}")
    if x.dim() == 5 and _MODES[mode] != "bicubic":
        return _volume(x, grid, bool(align_corners), _MODES[mode], padding_mode)
    return F.grid_sample(x, grid, _MODES[mode], padding_mode, bool(align_corners))


def _volume(x: Tensor, grid: Tensor, corners: bool, mode: str, padding: str) -> Tensor:
    """Sample `x [N, C, D, H, W]` at `grid [N, *out, 3]`, whose last axis has x, y, z between -1 and 1."""
    sizes = x.shape[2:]
    places = []
    for d, size in enumerate(sizes):
        at = grid[..., 2 - d]
        at = (at + 1) / 2 * (size - 1) if corners else ((at + 1) * size - 1) / 2
        if padding == "border":
            at = at.clamp(0, size - 1)
        elif padding == "reflection":
            at = _reflected(at, size, corners).clamp(0, size - 1)
        places.append(at)
    if mode == "nearest":
        return interpolated(x, [torch.round(at) for at in places])
    return interpolated(x, places)


def _reflected(at: Tensor, size: Any, corners: bool) -> Tensor:
    low, span = (0.0, size - 1) if corners else (-0.5, size)
    if corners and size == 1:
        return at * 0
    turned = torch.remainder(at - low, 2 * span)
    return torch.where(turned > span, 2 * span - turned, turned) + low


def interpolated(x: Tensor, places: list[Tensor], *, edge: bool = False) -> Tensor:
    """Interpolate `x [N, C, *sizes]` between elements at `places`, one `[N, *out]` a dimension, to `[N, C, *out]`.

    Beyond the ends are zeros, or with `edge` what is there.
    """
    batch, channels, *sizes = x.shape
    flat = x.reshape(batch, channels, -1)
    shape = places[0].shape[1:]
    total = torch.zeros(batch, channels, *shape, dtype=x.dtype)
    for corner in range(2 ** len(sizes)):
        weight = torch.ones(batch, *shape, dtype=x.dtype)
        index = torch.zeros(batch, *shape, dtype=torch.int64)
        for d, (at, size) in enumerate(zip(places, sizes, strict=True)):
            low = torch.floor(at)
            upper = corner >> d & 1
            place = low + upper
            part = at - low if upper else 1 - (at - low)
            inside = (place >= 0) & (place <= size - 1)
            weight = weight * (part if edge else torch.where(inside, part, 0.0))
            index = index * size + place.clamp(0, size - 1).long()
        taken = torch.gather(flat, 2, index.reshape(batch, 1, -1).expand(batch, channels, -1))
        total = total + taken.reshape(batch, channels, *shape) * weight[:, None]
    return total


@rule("RoiAlign")
def _roi_align(
    node: Node, x: Tensor, rois: Tensor, batches: Tensor, *, coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg", output_height: int = 1, output_width: int = 1, sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Pool regions, each a grid of bins with `sampling_ratio` samples along each side."""
    if sampling_ratio <= 0:
        raise CaptureError(f"{node}: how many samples it takes depends on the data; set sampling_ratio")
    half = coordinate_transformation_mode == "half_pixel"
    scaled = rois * spatial_scale - (0.5 if half else 0.0)
    picked = x.index_select(0, batches.long())
    along = []
    for first, last, bins in ((1, 3, output_height), (0, 2, output_width)):
        begin, length = scaled[:, first], scaled[:, last] - scaled[:, first]
        length = length if half else length.clamp_min(1.0)
        steps = (torch.arange(bins * sampling_ratio) + 0.5) / sampling_ratio
        along.append(begin[:, None] + steps * (length / bins)[:, None])
    ys, xs = along
    rows, columns = ys.shape[1], xs.shape[1]
    ys = ys[:, :, None].expand(-1, rows, columns)
    xs = xs[:, None, :].expand(-1, rows, columns)
    sizes = x.shape[2:]
    outside = (ys < -1) | (ys > sizes[0]) | (xs < -1) | (xs > sizes[1])
    kept = [at.clamp(0, size - 1) for at, size in zip((ys, xs), sizes, strict=True)]
    if mode == "max":
        return _largest(picked, kept, outside, output_height, output_width, sampling_ratio)
    found = torch.where(outside[:, None], 0.0, interpolated(picked, kept, edge=True))
    return _binned(found, output_height, output_width, sampling_ratio).mean(-1)


def _binned(x: Tensor, height: int, width: int, ratio: int) -> Tensor:
    n, c = x.shape[:2]
    return (
        x.reshape(n, c, height, ratio, width, ratio)
        .permute(0, 1, 2, 4, 3, 5)
        .reshape(n, c, height, width, -1)
    )


def _largest(x: Tensor, places: list[Tensor], outside: Tensor, height: int, width: int, ratio: int) -> Tensor:
    """The largest of weighted corners, as ONNX defines the mode max."""
    n, c, *sizes = x.shape
    flat, shape = x.reshape(n, c, -1), places[0].shape[1:]
    best: Tensor | None = None
    for corner in range(4):
        weight, index = torch.ones(n, *shape, dtype=x.dtype), torch.zeros(n, *shape, dtype=torch.int64)
        for d, (at, size) in enumerate(zip(places, sizes, strict=True)):
            low = torch.floor(at)
            upper = corner >> d & 1
            weight = weight * (at - low if upper else 1 - (at - low))
            index = index * size + (low + upper).clamp(0, size - 1).long()
        taken = torch.gather(flat, 2, index.reshape(n, 1, -1).expand(n, c, -1)).reshape(n, c, *shape)
        part = taken * weight[:, None]
        best = part if best is None else torch.maximum(best, part)
    assert best is not None
    return _binned(torch.where(outside[:, None], 0.0, best), height, width, ratio).amax(-1)


@rule("DeformConv")
def _deform_conv(
    node: Node, x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *,
    dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
    offset_group: int = 1, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Convolve in two dimensions, with places that are moved by offsets."""
    if x.dim() != 4:
        raise CaptureError(f"{node}: only two dimensions are compiled")
    n, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    strides, dilations, pads = strides or [1, 1], dilations or [1, 1], pads or [0] * 4
    oh, ow = offset.shape[2:]
    moved = offset.reshape(n, offset_group, kh * kw, 2, oh, ow)
    base = [
        (torch.arange(out) * strides[d] - pads[d]).reshape([-1 if e == d else 1 for e in range(2)])
        for d, out in enumerate((oh, ow))
    ]
    inside = [
        (torch.arange(kh) * dilations[0])[:, None].expand(kh, kw).reshape(-1, 1, 1),
        (torch.arange(kw) * dilations[1])[None, :].expand(kh, kw).reshape(-1, 1, 1),
    ]
    grouped = x.reshape(n * offset_group, c // offset_group, h, w)
    places = [
        (moved[:, :, :, d] + (base[d] + inside[d]).to(x.dtype)).reshape(n * offset_group, kh * kw, oh, ow)
        for d in range(2)
    ]
    columns = interpolated(grouped, places)  # [N * groups, C / groups, kernel, out]
    if mask is not None:
        columns = columns * mask.reshape(n * offset_group, 1, kh * kw, oh, ow)
    columns = columns.reshape(n, group, c // group * kh * kw, oh * ow)
    product = torch.matmul(weight.reshape(group, weight.shape[0] // group, -1), columns)
    found = product.reshape(n, weight.shape[0], oh, ow)
    return found if bias is None else found + bias.reshape(1, -1, 1, 1)

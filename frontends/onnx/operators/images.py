"""Resize: each axis by taps, which are elements around a place and their weights."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__: list[str] = []

#: elements of an axis of known size, whose places are computed at once
_LONGEST = 1 << 24


@dataclass(frozen=True)
class _Way:
    """How places are found and what is taken there: attributes of Resize."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    antialias: bool
    inside: bool
    outer: float


@rule("Resize", plain=(1, 2, 3))
def _resize(
    node: Node, x: Tensor, roi: list[float] | None = None, scales: list[float] | None = None,
    sizes: list[Any] | None = None, *, antialias: int = 0, axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel", cubic_coeff_a: float = -0.75, exclude_outside: int = 0,
    extrapolation_value: float = 0.0, keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:  # fmt: skip
    along = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    if scales:
        factors: list[Any] = scales
        wanted = [
            math.floor(x.shape[a] * s) if s != 1 else x.shape[a] for a, s in zip(along, scales, strict=True)
        ]
    elif sizes:
        factors = [size / x.shape[a] for a, size in zip(along, sizes, strict=True)]
        wanted = sizes
        if keep_aspect_ratio_policy != "stretch":
            one = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [one] * len(along)
            wanted = [math.floor(x.shape[a] * one + 0.5) for a in along]
    else:
        raise CaptureError(f"{node}: it has neither scales nor sizes")
    way = _Way(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(antialias), bool(exclude_outside),
        extrapolation_value,
    )  # fmt: skip
    region = list(roi) if roi else [0.0] * len(along) + [1.0] * len(along)
    for at, (axis, factor, out) in enumerate(zip(along, factors, wanted, strict=True)):
        ends = region[at], region[at + len(along)]
        same = (
            isinstance(out, int) and isinstance(x.shape[axis], int) and out == x.shape[axis] and factor == 1
        )
        if not same or way.coordinates == "tf_crop_and_resize":
            x = _along(node, x, axis, factor, out, ends, way)
    return x


def _along(
    node: Node, x: Tensor, axis: int, factor: Any, out: Any, ends: tuple[float, float], way: _Way
) -> Tensor:
    size = x.shape[axis]
    fixed = isinstance(size, int) and isinstance(out, int)
    if fixed and out > _LONGEST:
        raise CaptureError(f"{node}: an axis of {out} elements is more than {_LONGEST}; it is refused")
    # What is known is computed now; what depends on sizes that are left open is computed when they are known.
    with _disable_current_modes() if fixed else nullcontext():
        places = _places(node, size, factor, out, ends, way)
        index, weights = _taps(node, places, size, factor, way)
        beyond = (places < 0) | (places > size - 1)
    wide = x if x.is_floating_point() else x.float()
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    if way.mode == "nearest":
        found = x.index_select(axis, index[0])
    else:
        parts = [
            wide.index_select(axis, i) * w.to(wide.dtype).reshape(shape)
            for i, w in zip(index, weights, strict=True)
        ]
        found = torch.stack(parts).sum(0) if len(parts) > 4 else sum(parts[1:], start=parts[0])
    if way.coordinates == "tf_crop_and_resize":
        found = torch.where(beyond.reshape(shape), torch.full((), way.outer, dtype=found.dtype), found)
    return found if x.is_floating_point() or way.mode == "nearest" else torch.round(found).to(x.dtype)


def _places(node: Node, size: Any, factor: Any, out: Any, ends: tuple[float, float], way: _Way) -> Tensor:
    """Where each new element lies among the old ones, in float64."""
    at = torch.arange(out, dtype=torch.float64)
    match way.coordinates:
        case "half_pixel":
            return (at + 0.5) / factor - 0.5
        case "pytorch_half_pixel":
            return (at + 0.5) / factor - 0.5 if out != 1 else at * 0
        case "half_pixel_symmetric":
            real = factor * size
            adjust = math.floor(real) / real
            return size / 2 * (1 - adjust) + (at + 0.5) / factor - 0.5
        case "asymmetric":
            return at / factor
        case "align_corners":
            return at * ((size - 1) / (factor * size - 1)) if out != 1 else at * 0
        case "tf_half_pixel_for_nn":
            return (at + 0.5) / factor
        case "tf_crop_and_resize":
            first, last = ends
            if out == 1:
                return at * 0 + 0.5 * (first + last) * (size - 1)
            return first * (size - 1) + at * (last - first) * (size - 1) / (out - 1)
    raise CaptureError(f"{node}: there are no coordinates {way.coordinates!r}")


def _taps(node: Node, places: Tensor, size: Any, factor: Any, way: _Way) -> tuple[Tensor, Tensor]:
    """Return the elements `[taps, out]` that are read, and their weights."""
    if way.mode == "nearest":
        rounded = {
            "round_prefer_floor": torch.ceil(places - 0.5),
            "round_prefer_ceil": torch.floor(places + 0.5),
            "floor": torch.floor(places),
            "ceil": torch.ceil(places),
        }
        if way.nearest not in rounded:
            raise CaptureError(f"{node}: there is no nearest_mode {way.nearest!r}")
        index = rounded[way.nearest].clamp(0, size - 1).long()[None]
        return index, torch.ones_like(index)
    if way.mode not in ("linear", "cubic"):
        raise CaptureError(f"{node}: there is no mode {way.mode!r}")
    reach = 1 if way.mode == "linear" else 2
    shrink = min(factor, 1.0) if way.antialias else 1.0
    first = math.floor(-reach / shrink) + 1
    base = torch.ceil(places) - 1
    taps = torch.arange(first, 2 - first, dtype=torch.float64)[:, None]
    away = ((taps - (places - base)) * shrink).abs()
    weights = (1 - away).clamp(0, 1) if way.mode == "linear" else _cubic(away, way.cubic)
    index = base + taps
    if way.inside:
        weights = torch.where((index < 0) | (index > size - 1), 0.0, weights)
    if way.inside or way.antialias:
        weights = weights / weights.sum(0)
    return index.clamp(0, size - 1).long(), weights


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' kernel."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))

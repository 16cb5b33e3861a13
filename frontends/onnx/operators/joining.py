"""Parts of tensors, and tensors of parts: concat, split, slice, pad, triangles, windows of a fixed place."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CaptureError
from specqd.frontends.onnx.coded import Coded
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.operators.shapes import held
from specqd.frontends.onnx.rules import rule
from specqd.frontends.onnx.values import single

__all__: list[str] = []


@rule("Concat", coded=True)
def _concat(node: Node, *parts: Any, axis: int) -> Any:
    if any(isinstance(part, Coded) for part in parts):
        return Coded(torch.cat([part.codes for part in parts], axis), parts[0].type)
    return torch.cat(parts, axis)


@rule("Split", plain=(1,))
def _split(
    node: Node, x: Tensor, split: list[int] | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> Any:
    """Equal parts if no sizes are given; the last may be smaller."""
    if split is not None:
        return tuple(torch.split(x, split, axis))
    parts = num_outputs or len(node.outputs)
    size = -(-x.shape[axis] // parts)
    bounds = [min(size * at, x.shape[axis]) for at in range(parts + 1)]
    return tuple(x.narrow(axis, a, b - a) for a, b in itertools.pairwise(bounds))


@rule("Slice", plain=(1, 2, 3, 4), coded=True)
def _slice(
    node: Node, x: Any, starts: list[Any], ends: list[Any], axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Any:  # fmt: skip
    along = list(range(len(starts))) if axes is None else axes
    for axis, start, end, step in zip(along, starts, ends, steps or [1] * len(starts), strict=True):
        if step == 0:
            raise CaptureError(f"{node}: a step of 0 gives no elements")
        x = held(x, lambda t, at=(axis, start, end, step): _sliced(t, *at))
    return x


def _sliced(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    axis %= x.dim()
    size = x.shape[axis]
    if step > 0:
        return x[(slice(None),) * axis + (slice(start, end, step),)]
    # Backward: the elements from the other end of what is turned around.
    first = start + size if start < 0 else start
    last = end + size if end < 0 else end
    begin = size - 1 - min(first, size - 1)
    stop = size - 1 - max(last, -1) if last > -size else size
    return x.flip(axis)[(slice(None),) * axis + (slice(begin, stop, -step),)]


@rule("Pad", plain=(1, 3), maybe=(2,))
def _pad(
    node: Node, x: Tensor, pads: list[int], value: Any = None, axes: list[int] | None = None, *,
    mode: str = "constant",
) -> Tensor:  # fmt: skip
    """Add elements at both ends of axes, or take some away where a number is negative."""
    along = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    if len(pads) != 2 * len(along):
        raise CaptureError(f"{node}: {len(pads)} pads do not fit {len(along)} axes")
    both = {axis: (pads[at], pads[at + len(along)]) for at, axis in enumerate(along)}
    if mode == "constant":
        if isinstance(value, Tensor):
            inside = _constant(torch.ones_like(x, dtype=torch.bool), both, False)
            return torch.where(inside, _constant(x, both, 0), value)
        number = single(value)
        return _constant(x, both, 0 if number is None else number)
    for axis, (before, after) in both.items():
        x = _mirrored(node, x, axis, before, after, mode)
    return x


def _constant(x: Tensor, both: dict[int, tuple[int, int]], value: Any) -> Tensor:
    pairs = [both.get(axis, (0, 0)) for axis in reversed(range(x.dim()))]
    return F.pad(x, [one for pair in pairs for one in pair], value=value)


def _mirrored(node: Node, x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    size = x.shape[axis]
    at = torch.arange(-before, size + after)
    if mode == "edge":
        at = at.clamp(0, size - 1)
    elif mode == "wrap":
        at = torch.remainder(at, size)
    elif mode == "reflect":
        turn = torch.remainder(at, max(2 * size - 2, 1))
        at = torch.where(turn < size, turn, 2 * size - 2 - turn)
    else:
        raise CaptureError(f"{node}: there is no padding {mode!r}")
    return x.index_select(axis, at)


@rule("Trilu", maybe=(1,))
def _trilu(node: Node, x: Tensor, k: Any = 0, *, upper: int = 1) -> Tensor:
    by = 0 if k is None else single(k)
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
    kept = columns - rows >= by if upper else columns - rows <= by
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


@rule("ReverseSequence")
def _reverse_sequence(
    node: Node, x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    """Turn around the first elements of each sequence."""
    at = torch.arange(x.shape[time_axis])[:, None]
    turned = torch.where(at < lengths, lengths - 1 - at, at)  # [time, batch]
    if (batch_axis, time_axis) == (1, 0):
        return _taken_rows(x, turned)
    return _taken_rows(x.transpose(0, 1), turned).transpose(0, 1)


def _taken_rows(x: Tensor, at: Tensor) -> Tensor:
    index = at.reshape(*at.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return torch.gather(x, 0, index)


@rule("CenterCropPad", plain=(1,))
def _center_crop_pad(node: Node, x: Tensor, shape: list[int], *, axes: list[int] | None = None) -> Tensor:
    for axis, size in zip(range(x.dim()) if axes is None else axes, shape, strict=True):
        axis %= x.dim()
        have = x.shape[axis]
        if size <= have:
            x = x.narrow(axis, (have - size) // 2, size)
        else:
            before = (size - have) // 2
            x = _constant(x, {axis: (before, size - have - before)}, 0)
    return x

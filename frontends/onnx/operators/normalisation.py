"""Norms and softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__: list[str] = []


@rule("Softmax", "LogSoftmax")
def _softmax(node: Node, x: Tensor, *, axis: int = -1) -> Tensor:
    return (F.softmax if node.op == "Softmax" else F.log_softmax)(x, axis)


@rule("BatchNormalization")
def _batch_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float = 1e-5,
    momentum: float = 0.9, training_mode: int = 0,
) -> Any:  # fmt: skip
    """Normalise with given statistics; in training mode with those of the batch, and give running ones."""
    if not training_mode:
        mean, variance, scale, bias = (v.to(x.dtype) for v in (mean, variance, scale, bias))
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    now, spread = x.mean(axes), x.var(axes, correction=0)
    y = (x - now.reshape(shape)) * torch.rsqrt(spread.reshape(shape) + epsilon)
    kept = momentum * mean + (1 - momentum) * now, momentum * variance + (1 - momentum) * spread
    return y * scale.reshape(shape) + bias.reshape(shape), *kept


@rule("InstanceNormalization")
def _instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@rule("LayerNormalization")
def _layer_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Any:  # fmt: skip
    shape = list(x.shape[axis:])
    wide = x.float() if stash_type == 1 else x
    plain = scale.dim() == len(shape) and all(a == b for a, b in zip(scale.shape, shape, strict=True))
    if len(node.outputs) == 1 and plain and x.dtype == torch.float32:
        return F.layer_norm(x, shape, scale, bias, epsilon)
    axes = list(range(axis % x.dim(), x.dim()))
    mean = wide.mean(axes, keepdim=True)
    inverse = torch.rsqrt((wide - mean).square().mean(axes, keepdim=True) + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    return y if bias is None else y + bias, mean, inverse


@rule("RMSNormalization")
def _rms_norm(
    node: Node, x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.float() if stash_type == 1 else x
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


@rule("GroupNormalization", since=21)
def _group_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:  # fmt: skip
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@rule("GroupNormalization", since=18)
def _group_norm_by_group(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """Scale and bias are those of groups in opset 18."""
    each = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


@rule("LpNormalization")
def _lp_normalization(node: Node, x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    if p not in (1, 2):
        raise CaptureError(f"{node}: there is no norm with p = {p}")
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@rule("LRN")
def _local_response(
    node: Node, x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """Divide by what neighbouring channels hold."""
    before = (size - 1) // 2
    squares = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    total = squares.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * total).pow(beta)

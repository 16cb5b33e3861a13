"""Which operators mix rows: whether what one index of a dimension gives depends on its other indices.

A decoder whose rows meet in attention alone can go on from cached keys and values, and a model of clips whose frames
meet late can go on from what is known of earlier frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

__all__ = ["is_judged", "mixes"]

aten = torch.ops.aten


def _named(names: str) -> set[OpOverloadPacket]:
    return {getattr(aten, name) for name in names.split()}


_CONTRACTIONS = {aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
_ALONG_A_DIMENSION = _named("""
    _log_softmax _softmax all amax amin any argmax argmin argsort cummax cummin cumprod cumsum diff flip
    gather index_add index_select log_softmax logcumsumexp logsumexp max mean min narrow prod roll
    scatter select select_scatter slice slice_scatter softmax sort std sum topk unfold var
""")
_ELEMENTWISE = {aten.max.other, aten.min.other}
#: of which only the first of several images is one that a batch holds side by side
_OF_IMAGES = _named("""
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d group_norm max_pool1d max_pool2d max_pool3d pixel_shuffle
    upsample_bilinear2d upsample_nearest2d
""")
_IMAGE_DIMENSIONS = {"1d": 1, "2d": 2, "3d": 3}
_NEVER = _named("arange cdist convolution einsum gru index_put lstm masked_scatter nonzero tril triu")
_NOT_AT_ALL = _named("""
    batch_norm clone contiguous dropout embedding expand flatten layer_norm permute reshape rms_norm squeeze transpose
    unflatten unsqueeze view _to_copy
""")


def mixes(node: fx.Node, rows: Callable[[Any], tuple[bool, ...]]) -> bool:
    """Say whether an operator lets rows depend on each other, or counts them.

    Operators that are not known here are taken for elementwise ones; see `is_judged`.

    Args:
        node: calls an operator.
        rows: says of a value, for each of its dimensions, whether it holds rows.
    """
    packet, given = node.target.overloadpacket, rows(node.args[0] if node.args else None)
    if packet in _NEVER:
        return any((*given, *rows(node)))
    if packet is aten.scaled_dot_product_attention:
        return any(flag for source in node.args[:3] for flag in rows(source)[-2:])
    if packet in _OF_IMAGES:
        return any(given[_batched(node, len(given)) :])
    if packet is aten.batch_norm:
        return bool(node.args[5]) and any(given)
    if packet in _CONTRACTIONS:
        left = rows(node.args[1]) if packet in (aten.addmm, aten.baddbmm) else given
        return bool(left) and left[-1]
    if packet is aten.pad or packet is aten.constant_pad_nd:
        return any(given[len(given) - len(node.args[1]) // 2 :])
    if packet is aten.index:
        return any(flag for flag, at in zip(given, node.args[1], strict=False) if at is not None)
    if packet in _ALONG_A_DIMENSION and node.target not in _ELEMENTWISE:
        return any(given[d] for d in _dimensions(node, len(given)))
    return False


def is_judged(node: fx.Node) -> bool:
    """Say whether `mixes` knows an operator, so that its answer is no guess."""
    if not isinstance(node.target, OpOverload):
        return False
    known = _NEVER | _OF_IMAGES | _CONTRACTIONS | _ALONG_A_DIMENSION | _NOT_AT_ALL
    others = {aten.scaled_dot_product_attention, aten.pad, aten.constant_pad_nd, aten.index}
    packet = node.target.overloadpacket
    return (
        packet in known
        or packet in others
        or torch.Tag.pointwise in node.target.tags
        or "quantize_per" in packet.__name__  # and dequantize_per
    )


def _batched(node: fx.Node, rank: int) -> int:
    """Return how many dimensions in front hold images side by side: one, or none where there is one image."""
    name = node.target.overloadpacket.__name__
    size = next((count for ending, count in _IMAGE_DIMENSIONS.items() if name.endswith(ending)), rank - 2)
    return int(rank == size + 2)


def _dimensions(node: fx.Node, rank: int) -> list[int]:
    """Dimensions that an operator with an argument `dim`, `dims` or none runs along."""
    names = [a.name for a in node.target._schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    name = next((n for n in ("dim", "dims", "dimension") if n in names), None)
    dims = given.get(name, defaults[name]) if name else None
    if dims is None or dims == []:
        return list(range(rank))
    return [int(d) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]

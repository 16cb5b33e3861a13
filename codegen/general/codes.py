"""Codes: what stands for float32 in fewer bits, and how it moves in a graph to the operators that compute with it.

Codes are integers with a scale, which `quantized_decomposed` operators make and read, or BF16, which conversions do.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import specqd.ops  # noqa: F401  (registers the operators)
from specqd.codegen.dense_kernels.spec import RANGE

__all__ = [
    "DEQUANTIZE",
    "DEQUANTIZE_CHANNELS",
    "QUANTIZE",
    "TAKES_BF16",
    "is_read",
    "is_rounding",
    "move_codes",
    "reads_channels",
]

aten = torch.ops.aten

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default

#: the least and the largest code, and the type, of what kernels round to
_WHOLE = {(*limits, getattr(torch, dtype)) for dtype, limits in RANGE.items()}

_REARRANGE = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.clone.default,
)  # fmt: skip
_MAX_POOL = (aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)

#: what is compiled of BF16 as such: no arithmetic
TAKES_BF16 = {*_REARRANGE, *_MAX_POOL, aten.cat.default, aten._to_copy.default}


def is_read(node: Any) -> bool:
    """Say whether a node makes float32 of codes that have one scale."""
    if not isinstance(node, fx.Node):
        return False
    return (node.target is DEQUANTIZE and not node.kwargs) or _converts(node, torch.bfloat16, torch.float32)


def reads_channels(node: Any) -> bool:
    """Say whether a node makes float32 of codes that have a scale a channel."""
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE_CHANNELS and not node.kwargs


def is_rounding(node: fx.Node, dtype: str) -> bool:
    """Say whether a node rounds to codes of a kind as kernels do: `bfloat16`, else integers of the whole range."""
    if dtype == "bfloat16":
        return _converts(node, torch.float32, torch.bfloat16)
    return node.target is QUANTIZE and node.args[3:] in _WHOLE


def _converts(node: fx.Node, source: torch.dtype, to: torch.dtype) -> bool:
    if node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return False
    return node.args[0].meta["val"].dtype is source and node.meta["val"].dtype is to


def move_codes(graph: fx.Graph) -> None:
    """Rearrange codes in the place of the numbers that they stand for; every node has `meta["val"]`, also afterwards.

        f(read(c))      ->  read(f(c))   for views, maximum pooling and concatenations of one scale
        round(read(c))  ->  c            for one scale

    So products find codes at their inputs whatever lies between, and the rest reads fewer bytes.
    """
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target in _REARRANGE and is_read(source):
            _behind(node, node, (source.args[0], *node.args[1:]), source)
        elif node.target is aten.t.default and reads_channels(source):
            _behind(node, node, (source.args[0],), source, axis=1 - source.args[3])
        elif node.target in _MAX_POOL and is_read(source) and not _places_read(node):
            for item in list(node.users):
                _behind(item, node, (source.args[0], *node.args[1:]), source, item=True)
        elif node.target is aten.cat.default and _alike(source):
            _behind(node, node, ([part.args[0] for part in source], *node.args[1:]), source[0])
        elif is_read(source) and _undoes(node, source):
            node.replace_all_uses_with(source.args[0])
    graph.eliminate_dead_code()


def _undoes(node: fx.Node, read: fx.Node) -> bool:
    if read.target is DEQUANTIZE:
        return node.target is QUANTIZE and node.args[1:6] == read.args[1:6]
    return is_rounding(node, "bfloat16")


def _alike(parts: Any) -> bool:
    return all(map(is_read, parts)) and len({(part.target, part.args[1:]) for part in parts}) == 1


def _places_read(pool: fx.Node) -> bool:
    return any(user.target is not operator.getitem or user.args[1] != 0 for user in pool.users)


def _behind(
    result: fx.Node, node: fx.Node, args: Any, source: fx.Node, *, item: bool = False, axis: int | None = None
) -> None:
    """Let `node` work on `args`, codes, and dequantise as `source` does what becomes of `result`."""
    graph, given = node.graph, list(source.args[1:])
    if axis is not None:
        given[2] = axis
    with graph.inserting_before(result):
        made = graph.call_function(node.target, args, dict(node.kwargs))
        codes = graph.call_function(operator.getitem, (made, 0)) if item else made
        real = graph.call_function(source.target, (codes, *given), dict(source.kwargs))
    dtype = source.args[0].meta["val"].dtype
    for new in (made, codes, real):
        new.meta = dict(node.meta)
    real.meta["val"] = result.meta["val"]
    codes.meta["val"] = result.meta["val"].to(dtype)
    if item:
        made.meta["val"] = (codes.meta["val"], *node.meta["val"][1:])
    result.replace_all_uses_with(real)

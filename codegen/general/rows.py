"""Rows: a convolution of one dimension as one of images of one row, in chains that stay images."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specqd.codegen.general.codes import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE

__all__ = ["rows_as_images"]

aten = torch.ops.aten

_DIM = 2
_POINTWISE = {
    QUANTIZE, DEQUANTIZE, aten._to_copy.default, aten.relu.default, aten.gelu.default, aten.silu.default,
    aten.sigmoid.default, aten.tanh.default, aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default,
    aten.mish.default, aten.leaky_relu.default, aten.elu.default, aten.add.Tensor, aten.mul.Tensor, aten.clone.default,
}  # fmt: skip


def rows_as_images(graph: fx.Graph) -> None:
    """Give convolutions of one dimension another one; every node has `meta["val"]`, also afterwards.

        convolution(x [B, C, W], w)  ->  squeeze(convolution(unsqueeze(x), unsqueeze(w)))
        f(squeeze(x), ...)           ->  squeeze(f(x, ...))                                for elementwise f
        unsqueeze(squeeze(x))        ->  x

    So what lies in blocks of channels stays in them from one convolution to the next.
    """
    for node in list(graph.nodes):
        if node.target is aten.convolution.default and len(node.args[1].meta["val"].shape) == 3:
            _convolution(node)
        elif node.target in _POINTWISE:
            _pointwise(node)
    graph.eliminate_dead_code()


def _convolution(node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, outer, groups = node.args
    if len(x.meta["val"].shape) != 3:
        return
    sizes = [[1, *stride], [0, *padding], [1, *dilation], transposed, [0, *outer], groups]
    _squeezed(node, node.target, (_image(node, x), _image(node, weight), bias, *sizes), {})


def _pointwise(node: fx.Node) -> None:
    given = [a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta["val"], torch.Tensor)]
    # Compared as text, for to compare open sizes would ask for what is equal in the example alone.
    if any(map(_is_row, given)) and len({str(a.meta["val"].shape) for a in [*given, node]}) == 1:
        args = tuple(_image(node, a) if a in given else a for a in node.args)
        _squeezed(node, node.target, args, dict(node.kwargs))


def _is_row(node: fx.Node) -> bool:
    """Say whether a node takes away the dimension of one row; of more rows, `squeeze` leaves it."""
    if node.target is not aten.squeeze.dim or node.args[1] != _DIM:
        return False
    return len(node.args[0].meta["val"].shape) > len(node.meta["val"].shape)


def _image(before: fx.Node, node: fx.Node) -> fx.Node:
    """Put a dimension of one row in; weights that are dequantised get it in their codes."""
    if _is_row(node):
        return node.args[0]
    if node.target is DEQUANTIZE_CHANNELS:
        return _called(before, node.target, (_image(before, node.args[0]), *node.args[1:]), node.kwargs, node)
    return _called(before, aten.unsqueeze.default, (node, _DIM), {}, node)


def _squeezed(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    image = _called(node, target, args, kwargs, node)
    with node.graph.inserting_before(node):
        row = node.graph.call_function(aten.squeeze.dim, (image, _DIM))
    row.meta = dict(node.meta)
    node.replace_all_uses_with(row)


def _called(before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any, like: fx.Node) -> fx.Node:
    """Call something in front of a node that gives the values of `like`, with the dimension."""
    with before.graph.inserting_before(before):
        made = before.graph.call_function(target, args, dict(kwargs))
    made.meta = {**like.meta, "val": like.meta["val"].unsqueeze(_DIM)}
    return made

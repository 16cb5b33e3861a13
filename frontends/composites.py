"""Composites: operators that torch takes apart on the way to a graph, put together again, as passes look for them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

__all__ = ["restore_batch_norms", "restore_composites"]

aten = torch.ops.aten

_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


def restore_composites(graph: fx.Graph) -> None:
    """Turn what becomes of convolutions, linears, maximum pooling and batch norms back into the one operator.

        convolution(x, w, b, ...)              ->  conv2d(x, w, b, ...)    unless transposed
        addmm(b, x, t(w)), mm(x, t(w))         ->  linear(x, w, b)
        getitem(max_pool2d_with_indices(x), 0) ->  max_pool2d(x)           where no one reads indices

    Every node of the graph has `meta["val"]`.
    """
    restore_batch_norms(graph)
    for node in list(graph.nodes):
        if node.target is aten.convolution.default and not node.args[6]:
            x, weight, bias, stride, padding, dilation, _, _, groups = node.args
            rank = len(weight.meta["val"].shape)
            if rank in _CONVOLUTIONS and len(x.meta["val"].shape) == rank:
                _replace(node, _CONVOLUTIONS[rank], (x, weight, bias, stride, padding, dilation, groups))
        elif node.target is aten.addmm.default and not node.kwargs and _is_transposed(node.args[2]):
            bias, x, weight = node.args
            if len(bias.meta["val"].shape) == 1:
                _replace(node, aten.linear.default, (x, weight.args[0], bias))
        elif node.target is aten.mm.default and _is_transposed(node.args[1]):
            _replace(node, aten.linear.default, (node.args[0], node.args[1].args[0]))
        elif node.target is aten.max_pool2d_with_indices.default:
            items = list(node.users)
            if all(item.target is operator.getitem and item.args[1] == 0 for item in items):
                for item in items:
                    _replace(item, aten.max_pool2d.default, node.args)
    graph.eliminate_dead_code()


def restore_batch_norms(graph: fx.Graph) -> None:
    """Turn what becomes of a batch norm where operators are made functional back into the one operator."""
    fixed, own = aten._native_batch_norm_legit_no_training.default, aten._native_batch_norm_legit.no_stats
    for node in [node for node in graph.nodes if node.target in (fixed, own)]:
        x, weight, bias, *statistics, momentum, eps = node.args
        statistics = [*statistics, False] if node.target is fixed else [None, None, True]
        for item in [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]:
            _replace(item, aten.batch_norm.default, (x, weight, bias, *statistics, momentum, eps, False))
    graph.eliminate_dead_code()


def _is_transposed(node: Any) -> bool:
    """Say whether it is `t` of a weight."""
    transposes = node.target is aten.t.default or (
        node.target is aten.permute.default and list(node.args[1]) == [1, 0]
    )
    return transposes and node.args[0].op == "get_attr"


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(target, args)
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)

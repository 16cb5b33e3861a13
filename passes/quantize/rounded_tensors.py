"""Which activations of a graph are rounded when some of its convolutions and linears are to read INT8 or BF16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Size, fx

from specqd.passes.match import arguments, calls, only_user

__all__ = ["rounded_tensors", "sources"]

aten, quantized = torch.ops.aten, torch.ops.quantized_decomposed

_VIEWS = (
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
    aten.permute, aten.transpose, aten.contiguous, aten.clone, aten.dropout, aten.expand,
)  # fmt: skip
#: what gives codes of its input's scale for codes
_KEEP = (*_VIEWS, aten.max_pool1d, aten.max_pool2d, aten.slice)
_ACTIVATIONS = (
    aten.relu, aten.relu6, aten.hardtanh, aten.silu, aten.sigmoid, aten.tanh, aten.hardswish, aten.hardsigmoid,
    aten.mish, aten.gelu,
)  # fmt: skip
#: readers of a convolution's result that are bound by how many bytes they read
_LIGHT = (
    aten.add, aten.mul, aten.mean, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d,
    aten.avg_pool1d, aten.avg_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.cat,
)  # fmt: skip


def rounded_tensors(
    graph: fx.Graph, products: Sequence[fx.Node], shape: Callable[[fx.Node], Size | None]
) -> list[tuple[fx.Node, ...]]:
    """Return groups of nodes whose values are to be rounded right behind them; a group shares a scale.

    1. The input of each product, or what a view or a maximum pooling before it reads; all of a concatenation share.
    2. The end of a convolution, with the addition and activation after it, where only additions, multiplications,
       poolings and the like read it.
    3. What is added to a product whose end is rounded.

    Args:
        graph: holds the products.
        products: convolutions and linears that are to read rounded values.
        shape: of a node's value; None if that is no tensor.
    """
    groups: list[set[fx.Node]] = []
    for product in products:
        _join(groups, sources(product.args[0]))
    ends = {product: _end(product, shape) for product in products}
    for product, (end, _) in ends.items():
        if not calls(product, aten.linear) and _only_light(end, products):
            _join(groups, [end])
    for product in reversed(products):
        end, residual = ends[product]
        if residual is not None and any(end in group for group in groups):
            _join(groups, sources(residual))
    order = {node: at for at, node in enumerate(graph.nodes)}
    fresh = ([n for n in group if not _is_rounded(n)] for group in groups)
    return [tuple(sorted(group, key=order.__getitem__)) for group in fresh if group]


def sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose codes, rearranged, are those of this one."""
    if calls(node, *_KEEP):
        return sources(node.args[0])
    if calls(node, aten.cat):
        return [source for part in node.args[0] for source in sources(part)]
    return [node]


def _is_rounded(node: fx.Node) -> bool:
    if calls(node, aten._to_copy):  # back from BF16, as cast-bf16 has it
        source = node.args[0]
        return calls(source, aten._to_copy) and source.kwargs.get("dtype") is torch.bfloat16
    return calls(node, quantized.dequantize_per_tensor)


def _join(groups: list[set[fx.Node]], nodes: Sequence[fx.Node]) -> None:
    joined = set(nodes)
    for group in [group for group in groups if group & joined]:
        groups.remove(group)
        joined |= group
    groups.append(joined)


def _end(product: fx.Node, shape: Callable[[fx.Node], Size | None]) -> tuple[fx.Node, fx.Node | None]:
    """Return the last node that a kernel of the product computes too, and what it adds; see codegen.general.ending."""
    at, residual = product, None
    while (user := only_user(at)) is not None:
        if calls(user, *_ACTIVATIONS):
            return user, residual
        if calls(product, aten.linear) and calls(user, *_VIEWS[:4]):
            at = user
            continue
        other = _summand(user, at, shape)
        if residual is not None or other is None or not other < product:
            break
        at, residual = user, other
    return at, residual


def _summand(user: fx.Node, at: fx.Node, shape: Callable[[fx.Node], Size | None]) -> fx.Node | None:
    if not calls(user, aten.add) or arguments(user).get("alpha", 1) != 1:
        return None
    others = [arg for arg in user.args[:2] if arg is not at]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or shape(others[0]) != shape(at):
        return None
    return others[0]


def _only_light(end: fx.Node, products: Sequence[fx.Node]) -> bool:
    readers = list(_readers(end))
    return bool(readers) and all(calls(reader, *_LIGHT) or reader in products for reader in readers)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from _readers(user) if calls(user, *_KEEP) else [user]

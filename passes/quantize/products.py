"""Convolutions and linears that may read fewer bits than float32, and how their inputs come to be rounded."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator

import torch
from torch import fx

from specqd.errors import InputError
from specqd.passes.match import arguments, calls, weight_of
from specqd.passes.rewrite import plain_name
from specqd.program import Entry, Program

from .rounded_tensors import sources

__all__ = ["candidates", "put_behind"]

aten, quantized = torch.ops.aten, torch.ops.quantized_decomposed

_PRODUCTS = (aten.conv1d, aten.conv2d, aten.linear)
_OTHERS = (aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)


def candidates(
    program: Program, entry: Entry, ignore: tuple[str, ...]
) -> Iterator[tuple[fx.Node, str | None]]:
    """Yield each product in the order of the graph, and why it is left in float32, or None.

    Args:
        program: holds the weights.
        entry: whose graph holds the products.
        ignore: shell-style patterns of weight names to leave alone.

    Raises:
        InputError: a pattern matches no weight of a product.
    """
    nodes = [node for node in entry.graph.nodes if calls(node, *_PRODUCTS, *_OTHERS)]
    names = list(filter(None, map(weight_of, nodes)))
    for pattern in ignore:
        if not fnmatch.filter(names, pattern):
            some = ", ".join(names[:3]) or "none"
            raise InputError(f"ignore={pattern} matches no weight of a convolution or linear, such as {some}")
    for node in nodes:
        yield node, _unsuitable(program, entry, node, ignore)


def _unsuitable(program: Program, entry: Entry, node: fx.Node, ignore: tuple[str, ...]) -> str | None:
    if entry.of_language_model:
        return "language models have passes of their own: use cast-int8 or cast-mxfp4"
    if not calls(node, *_PRODUCTS):
        return f"{plain_name(node.target)} has kernels for float32 alone"
    if calls(node.args[1], quantized.dequantize_per_channel, aten._to_copy):
        return "its weight is quantised already"
    name, bias = weight_of(node), arguments(node)["bias"]
    if name is None or (bias is not None and bias.op != "get_attr"):
        return "its weight or bias is computed, not stored"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
        return f"{name} is ignored"
    weight = program.weights[name]
    if weight.dtype is not torch.float32 or not weight.isfinite().all() or not weight.numel():
        return f"{name} is not float32, or holds NaN or infinity, or nothing"
    if any(source.op == "get_attr" for source in sources(node.args[0])):
        return "its input is a weight"
    return None


def put_behind(
    node: fx.Node, down: Callable[[fx.Graph, fx.Node], fx.Node], up: Callable[[fx.Graph, fx.Node], fx.Node]
) -> None:
    """Round the value of a node by `down`, and let all that compute with it read what `up` makes of that.

    The entry's own outputs stay as they are.
    """
    graph = node.graph
    last = graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node
    with graph.inserting_after(last):
        codes = down(graph, node)
    with graph.inserting_after(codes):
        real = up(graph, codes)
    for new in (codes, real):
        new.meta.update(
            {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        )
    node.replace_all_uses_with(
        real, lambda user: user is not codes and user.op != "output" and not calls(user, aten.sym_size)
    )

"""fold-batch-norm: batch norms with fixed statistics become part of the product beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import arguments, calls, shapes, weight_uses
from specqd.passes.rewrite import add_weight, read_weight, replace
from specqd.program import Entry, Program

__all__ = ["CONVOLUTIONS", "FoldBatchNorm"]

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
_PRODUCTS = (*CONVOLUTIONS, aten.linear)


class FoldBatchNorm(Pass):
    """Multiply the scale of a batch norm into the weight beside it, and add its shift to the bias.

        batch_norm(conv(x, w, b))  ->  conv(x, w * a, b * a + d)
        conv(batch_norm(x), w, b)  ->  conv(x, w * a, b + sum(w * d))

    With a = gamma / sqrt(var + eps) and d = beta - mean * a, by output or input channel, algebra makes the two equal.
    The new weights are computed in float64 and rounded once, so that outputs differ by a few roundings of the
    weights' dtype. Convolutions of one to three dimensions, grouped too, and linears are products.

    1. The product before the norm takes it in, else the one after it.
    2. Refused: a norm by the batch's own statistics, or with computed ones; one between products that others read too,
       or whose weight they do; and into a following convolution that pads, whose zeros the norm does not see.
    3. Weights keep their names, unless another entry reads them; so do the dense ones of pruned weights.
    """

    name = "fold-batch-norm"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Fold each batch norm, or say why not."""
        known = shapes(program, entry)
        for norm in entry.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
            given = arguments(norm)
            fault = _unfixed(given)
            before, after = given["input"], next(iter(norm.users), None)
            into_last, into_next = _fault_before(program, norm, known), _fault_after(program, norm, known)
            if fault or (into_last and into_next):
                yield Refusal(norm.name, fault or f"{into_last}; {into_next}")
            elif into_last is None:
                yield _fold_into_last(program, before, norm, _affine(program, given))
            else:
                yield _fold_into_next(program, norm, after, _affine(program, given))


class _Affine(NamedTuple):
    """What a batch norm with fixed statistics is, by channel: x * scale + shift, float64."""

    scale: Tensor
    shift: Tensor


def _unfixed(given: dict[str, Any]) -> str | None:
    if given["training"] or given["running_mean"] is None or given["running_var"] is None:
        return "it normalises by the batch's own statistics, for training left none"
    stored = (given[name] for name in ("weight", "bias", "running_mean", "running_var"))
    if any(node is not None and node.op != "get_attr" for node in stored):
        return "its statistics or its scale are computed"
    return None


def _affine(program: Program, given: dict[str, Any]) -> _Affine:
    def stored(name: str, default: float) -> Tensor:
        node = given[name]
        return torch.tensor(default).double() if node is None else program.weights[str(node.target)].double()

    scale = stored("weight", 1) / torch.sqrt(stored("running_var", 1) + given["eps"])
    return _Affine(scale, stored("bias", 0) - stored("running_mean", 0) * scale)


def _fault_of_product(program: Program, product: Any) -> str | None:
    if not calls(product, *_PRODUCTS):
        return f"{getattr(product, 'name', 'nothing')} is no convolution or linear"
    for node in product.args[1:3]:
        if node is not None and (node.op != "get_attr" or len(weight_uses(product.graph, node.target)) > 1):
            return f"{node.name} of {product.name} is computed, or others read it"
    return None


def _fault_before(program: Program, norm: fx.Node, known: dict[fx.Node, torch.Size]) -> str | None:
    before = norm.args[0]
    if len(before.users) > 1:
        return f"{before.name} before it has other readers"
    fault = _fault_of_product(program, before)
    if not fault and calls(before, aten.linear) and len(known[before]) != 2:
        return f"{before.name} before it has its channels last"
    return f"before it, {fault}" if fault else None


def _fault_after(program: Program, norm: fx.Node, known: dict[fx.Node, torch.Size]) -> str | None:
    after = next(iter(norm.users), None)
    if len(norm.users) != 1 or after is None or after.args[0] is not norm:
        return f"it has {len(norm.users)} readers"
    fault = _fault_of_product(program, after)
    if fault:
        return f"after it, {fault}"
    if calls(after, aten.linear):
        return f"{after.name} after it has its channels last" if len(known[norm]) != 2 else None
    padding = arguments(after)["padding"]
    pads = padding == "same" if isinstance(padding, str) else any(padding)
    return f"{after.name} after it pads with zeros that would need the shift" if pads else None


def _fold_into_last(program: Program, product: fx.Node, norm: fx.Node, affine: _Affine) -> fx.Node:
    def folded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = affine.scale.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.double() * scale, affine.shift + (0 if bias is None else bias.double() * affine.scale)

    return _rebuilt(program, product, norm, product.args[0], folded)


def _fold_into_next(program: Program, norm: fx.Node, product: fx.Node, affine: _Affine) -> fx.Node:
    def folded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        groups, (rows, channels) = int(arguments(product).get("groups", 1)), weight.shape[:2]
        scale, shift = (values.reshape(groups, 1, channels, 1) for values in affine)
        each = weight.double().reshape(groups, rows // groups, channels, -1)
        added = (each * shift).sum((2, 3)).flatten()
        return (each * scale).reshape(weight.shape), added + (0 if bias is None else bias.double())

    return _rebuilt(program, product, product, norm.args[0], folded)


def _rebuilt(program: Program, product: fx.Node, place: fx.Node, source: Any, folded: Any) -> fx.Node:
    """Put the product of folded weights in the place of a node."""
    weight, bias = product.args[1], product.args[2] if len(product.args) > 2 else None
    name = str(weight.target)
    bias_name = f"{name.removesuffix('weight')}bias" if bias is None else str(bias.target)
    old = program.weights[name], None if bias is None else program.weights[bias_name]
    new = [tensor.to(old[0].dtype) for tensor in folded(*old)]
    new_name = _store(program, product, name, new[0], own=True)
    new_bias = _store(program, product, bias_name, new[1], own=bias is not None)
    if name in program.dense:
        dense = folded(program.dense[name], program.dense.get(bias_name, old[1]))
        program.dense |= {new_name: dense[0].to(old[0].dtype), new_bias: dense[1].to(old[0].dtype)}
    nodes = [read_weight(place, stored) for stored in (new_name, new_bias)]
    new = replace(place, product.target, (source, *nodes, *product.args[3:]))
    for dead in dict.fromkeys((place, product)):
        product.graph.erase_node(dead)  # or it would count as a reader of the weight
    return new


def _store(program: Program, product: fx.Node, name: str, tensor: Tensor, own: bool) -> str:
    """Store under the name of a weight that only this product reads, else under one of its own."""
    others = [e.graph for e in program.entries.values() if e.graph is not product.graph]
    if own and not any(weight_uses(graph, name) for graph in others):
        program.weights[name] = tensor.contiguous()
        return name
    return add_weight(program, name, tensor)

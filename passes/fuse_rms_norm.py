"""fuse-rms-norm: one operator for root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from specqd.program import Entry, Program

from .contract import Pass, Refusal
from .match import arguments, calls, literal, only_user, same, shapes
from .rewrite import replace

__all__ = ["FuseRMSNorm"]

aten = torch.ops.aten


class _Norm(NamedTuple):
    """What was matched: `last` is replaced by rms_norm(x, weight, eps, offset)."""

    last: fx.Node
    x: fx.Node
    weight: fx.Node | None
    eps: float
    offset: float


class FuseRMSNorm(Pass):
    """Fuse the steps of RMSNorm over the last dimension.

        s = rsqrt(mean(x ** 2, -1, keepdim) + eps)

    1. `x * s` alone                        ->  rms_norm(x, None, eps, 0)
    2. `x * s * weight`                     ->  rms_norm(x, weight, eps, 0)
    3. `x * s * (1 + weight)` (Gemma)       ->  rms_norm(x, weight, eps, 1); any number in the place of 1
    4. `aten.rms_norm(x, [n], weight, eps)` ->  rms_norm(x, weight, eps, 0); no eps means float32's epsilon

    Products match in either order, and `x * x` like `x ** 2`. A weight that is not one vector of the last
    dimension (Cohere has one a head) stays an ordinary multiplication behind case 1. What is left alone says
    which of these conditions it breaks.
    """

    name = "fuse-rms-norm"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Try each rsqrt and each rms_norm of ATen."""
        nodes = [n for n in entry.graph.nodes if calls(n, aten.rsqrt, aten.rms_norm)]
        known = shapes(program, entry) if nodes else {}
        for node in nodes:
            found = _of_aten(node) if calls(node, aten.rms_norm) else _of_steps(node, known)
            if isinstance(found, str):
                yield Refusal(node.name, found)
            else:
                last, *args = found
                new = replace(last, torch.ops.specqd.rms_norm.default, tuple(args))
                known[new] = known[last]  # the next norm may read it
                yield new


def _of_aten(node: fx.Node) -> _Norm | str:
    given = arguments(node)
    if len(given["normalized_shape"]) != 1:
        return f"it normalises the last {len(given['normalized_shape'])} dimensions, not one"
    eps = torch.finfo(torch.float32).eps if given["eps"] is None else given["eps"]
    return _Norm(node, given["input"], given["weight"], float(eps), 0.0)


def _of_steps(rsqrt: fx.Node, known: dict[fx.Node, torch.Size]) -> _Norm | str:
    inner = rsqrt.args[0]
    plus_eps = literal(inner, aten.add) if isinstance(inner, fx.Node) else None
    if plus_eps is None or not calls(plus_eps[0], aten.mean):
        return "it is not taken of a mean plus a number"
    mean, eps = plus_eps
    averaged = arguments(mean)
    square = averaged["self"]
    x = _squared(square)
    if x is None:
        return f"the mean is of {square}, which is not a square"
    if list(averaged.get("dim") or []) not in ([-1], [len(known[x]) - 1]) or not averaged.get("keepdim"):
        return f"{mean} is not over the last dimension alone, or does not keep it"
    shared = [n for n in (square, mean, inner) if len(n.users) != 1]
    if shared:
        return f"{shared[0]} is also used elsewhere"
    scaled = only_user(rsqrt, aten.mul)
    if scaled is None:
        return "it is not used by one multiplication alone"
    if not same(_other(scaled, rsqrt), x):
        return f"{scaled} scales {_other(scaled, rsqrt)}, but the mean is over the square of {x}"
    return _with_weight(scaled, x, eps, known)


def _squared(node: fx.Node) -> fx.Node | None:
    if calls(node, aten.pow) and node.args[1] == 2:
        return node.args[0]
    if calls(node, aten.mul) and isinstance(node.args[0], fx.Node) and same(*node.args[:2]):
        return node.args[0]
    return None


def _other(product: fx.Node, factor: fx.Node) -> fx.Node:
    a, b = product.args
    return b if a is factor else a


def _with_weight(scaled: fx.Node, x: fx.Node, eps: float, known: dict[fx.Node, torch.Size]) -> _Norm:
    """Take the multiplication by a weight in, if that is all that happens to the scaled value."""
    product = only_user(scaled, aten.mul)
    weight: object = _other(product, scaled) if product else None
    offset = 0.0
    if calls(weight, aten.add):
        weight, offset = literal(weight, aten.add) or (None, 0.0)
    stored = isinstance(weight, fx.Node) and weight.op == "get_attr"
    if product is None or not stored or known[weight] != known[x][-1:]:
        return _Norm(scaled, x, None, eps, 0.0)
    return _Norm(product, x, weight, eps, offset)

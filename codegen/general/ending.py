"""What follows a product in a graph and can be done to its sums before they are written: a residual, an activation.

A product of codes may also end in codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from specqd.codegen.general.codes import is_read, is_rounding

__all__ = ["Ending", "ending"]

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.mish.default: "mish",
}


@dataclass(frozen=True)
class Ending:
    """A residual that is added, then an activation; `taken` maps each node that this does to the one before it.

    Attributes:
        rounded: the node that rounds the result to codes; a residual is then what codes of the same dtype stand for.
    """

    residual: fx.Node | None
    activation: str | None
    taken: dict[fx.Node, fx.Node]
    rounded: fx.Node | None = None


def ending(
    node: fx.Node, computed: Callable[[fx.Node], bool], *, through_views: bool, dtype: str = "float32"
) -> Ending:
    """Follow the only reader of each value from `node` on, as far as a kernel can do what it does.

    A residual has to be `computed` by then, and of the same shape; views between do not matter to a kernel that takes
    its result for a matrix. Kernels that multiply codes, of `dtype`, may
    round what they give to such.
    """
    residual: fx.Node | None = None
    taken: dict[fx.Node, fx.Node] = {}
    if (
        node.meta["val"].dtype is not torch.float32
    ):  # kernels only have float32, and what follows is of this dtype
        return Ending(None, None, taken)
    at, activation = node, None
    while len(at.users) == 1 and activation is None:
        (user,) = at.users
        if through_views and user.target in _VIEWS:
            at = user
            continue
        activation = _activation(user)
        if activation is None:
            other = _other(user, at)
            if residual is not None or other is None or not computed(other):
                break
            residual = other
        taken[user] = at
        at = user
    rounded = None if dtype == "float32" else _rounded(at, residual, through_views, dtype)
    if rounded is not None:
        taken[rounded] = rounded.args[0]
    return Ending(residual, activation, taken, rounded)


def _rounded(at: fx.Node, residual: fx.Node | None, through_views: bool, dtype: str) -> fx.Node | None:
    """The node that rounds the last value of an ending, and is alone in reading it."""
    while len(at.users) == 1:
        (user,) = at.users
        if through_views and user.target in _VIEWS:
            at = user
            continue
        return user if is_rounding(user, dtype) and _fits(residual, user) else None
    return None


def _fits(residual: fx.Node | None, rounding: fx.Node) -> bool:
    if residual is None:
        return True
    return is_read(residual) and residual.args[0].meta["val"].dtype is rounding.meta["val"].dtype


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.target is aten.hardtanh.default and tuple(node.args[1:]) in ((0, 6), (0.0, 6.0)):
        return "relu6"
    return _ACTIVATIONS.get(node.target)


def _other(node: fx.Node, at: fx.Node) -> fx.Node | None:
    """The other summand of a plain sum of two tensors of one shape."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    operands: list[Any] = list(node.args)
    others = [x for x in operands if x is not at]
    if len(operands) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    mine, other = at.meta["val"], others[0].meta["val"]
    alike = (
        isinstance(other, torch.Tensor) and other.dtype == mine.dtype and str(other.shape) == str(mine.shape)
    )
    return others[0] if alike else None

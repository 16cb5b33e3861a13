"""conv1d-to-linear: matrices stored as [inputs, outputs] become ordinary linears."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from specqd.program import Entry, Program

from .contract import Pass, Refusal
from .match import arguments, calls, only_user, shapes
from .rewrite import add_weight, read_weight, replace

__all__ = ["Conv1dToLinear"]

aten = torch.ops.aten


class Conv1dToLinear(Pass):
    """Turn products with a stored [inputs, outputs] matrix (GPT-2's Conv1D) into linears over its transpose.

    1. addmm(bias, x, w)  ->  linear(x, w.transposed, bias)
    2. mm(x, w) and matmul(x, w)  ->  linear(x, w.transposed)
    3. Where x is reshape(t, [-1, inputs]) of t [..., inputs] and the product is only reshaped back to [...,
       outputs], both reshapes go: linear(t, w.transposed, bias).

    A product of two computed values is none of these and is not looked at. Refused: addmm with factors, a
    bias that is not one stored number for each output, and a matrix of a rank other than 2.
    """

    name = "conv1d-to-linear"

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Rewrite each product whose second factor is stored."""
        found = [n for n in entry.graph.nodes if calls(n, aten.addmm, aten.mm, aten.matmul) and _factors(n)]
        known = shapes(program, entry) if found else {}
        for node in found:
            reason = _unsuitable(node, known)
            if reason:
                yield Refusal(node.name, reason)
                continue
            x, weight = _factors(node) or node.args
            name = str(weight.target)
            stored = add_weight(program, f"{name}.transposed", program.weights[name].T)
            bias = arguments(node)["self"] if calls(node, aten.addmm) else None
            whole, last = _without_reshapes(node, x, known)
            args = (whole, read_weight(last, stored), bias)
            new = replace(last, aten.linear.default, args if bias else args[:2])
            known[new] = known[last]  # the next product may read it
            yield new


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    x, weight = node.args[1:3] if calls(node, aten.addmm) else node.args[:2]
    stored = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return (x, weight) if stored else None


def _unsuitable(node: fx.Node, known: dict[fx.Node, torch.Size]) -> str | None:
    given = arguments(node)
    _, weight = _factors(node) or node.args
    if len(known[weight]) != 2:
        return f"its matrix {weight} is {list(known[weight])}, not [inputs, outputs]"
    if not calls(node, aten.addmm):
        return None
    bias = given["self"]
    if (given["beta"], given["alpha"]) != (1, 1):
        return "it scales the bias or the product"
    if bias.op != "get_attr" or known[bias] != known[weight][1:]:
        return f"its bias {bias} is not one stored number for each output"
    return None


def _without_reshapes(node: fx.Node, x: fx.Node, known: dict[fx.Node, torch.Size]) -> tuple[fx.Node, fx.Node]:
    """Return the input and the node to replace: around the reshapes of case 3, or as they are."""
    back = only_user(node, aten.reshape, aten.view)
    if back is None or not calls(x, aten.reshape, aten.view):
        return x, node
    whole: fx.Node = x.args[0]
    through = known[whole][-1] == known[x][-1] and known[back] == (*known[whole][:-1], known[node][-1])
    return (whole, back) if through else (x, node)

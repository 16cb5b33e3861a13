"""The table of rules: how an ONNX operator is said in torch, and since which opset."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specqd.errors import CaptureError

from .graph import Node

__all__ = ["RULES", "Rule", "arguments", "found", "rule"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """`function(node, *inputs, **attributes)` gives the outputs of a node; a tuple if there are several.

    Inputs that are left out are None. Those at `plain` are numbers or lists, since shapes depend on them; those at
    `maybe` are where they are known, and tensors otherwise. With `coded`, inputs may be of types that torch cannot
    compute in (specqd.frontends.onnx.coded). Known inputs at `known` are given as such. `keeps(node, inputs)` says that
    a node stays in the graph although all of its inputs are known, since kernels read them as they are.
    """

    function: Function
    since: int
    plain: tuple[int, ...]
    maybe: tuple[int, ...]
    coded: bool
    known: tuple[int, ...]
    keeps: Callable[[Node, list[Any]], bool]


RULES: dict[tuple[str, str], list[Rule]] = {}
"""Rules by domain and operator, the newest first; filled by the modules of `operators`."""


def rule(
    *operators: str,
    since: int = 1,
    plain: tuple[int, ...] = (),
    maybe: tuple[int, ...] = (),
    coded: bool = False,
    known: tuple[int, ...] = (),
    keeps: Callable[[Node, list[Any]], bool] = lambda node, inputs: False,
    domain: str = "",
) -> Callable[[Function], Function]:
    """Enter a function into the table for operators, as they are defined from opset `since` on."""

    def enter(function: Function) -> Function:
        for operator in operators:
            listed = RULES.setdefault((domain, operator), [])
            listed.append(Rule(function, since, plain, maybe, coded, known, keeps))
            listed.sort(key=lambda one: -one.since)
        return function

    return enter


def found(node: Node) -> Rule | None:
    """Return the rule of a node in its opset; None if there is none."""
    from . import operators  # noqa: F401  (fills the table)

    return next((r for r in RULES.get((node.domain, node.op), ()) if r.since <= node.opset), None)


def arguments(rule: Rule, node: Node, inputs: list[Any]) -> inspect.BoundArguments:
    """Bind inputs and attributes to a rule's parameters; raises CaptureError for what it does not take."""
    try:
        return inspect.signature(rule.function).bind(node, *inputs, **node.attributes)
    except TypeError as error:
        raise CaptureError(f"{node}: {error}; the operator is not defined so") from error

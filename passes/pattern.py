"""Where a graph computes what a traced function does, with what in the place of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .match import arguments, calls, same

__all__ = ["Found", "Miss", "Pattern"]

aten = torch.ops.aten

_EITHER_ORDER = (aten.add, aten.mul)
_DIMENSIONS = ("dim", "dim0", "dim1", "dims")
_Bound = dict[Any, Any]


@dataclass(frozen=True)
class Found:
    """A match.

    Attributes:
        root: the node that gives the result.
        tensors: the nodes that take the place of parameters, by name.
        numbers: the numbers that do.
        dying: nodes that nothing reads without `root`, itself first.
        shared: which of the nodes inside are also read elsewhere, in words, if any.
    """

    root: fx.Node
    tensors: dict[str, fx.Node]
    numbers: dict[str, Any]
    dying: tuple[fx.Node, ...]
    shared: str | None


@dataclass(frozen=True)
class Miss:
    """What part of a pattern's operators matched before something else came; `seen` are the names of their nodes."""

    share: float
    why: str
    seen: tuple[str, ...]


class Pattern:
    """The calls of a traced function of one result; its parameters match anything."""

    def __init__(self, graph: fx.Graph, tensors: Sequence[str], numbers: dict[Any, str]) -> None:
        """Name what the placeholders and the marking numbers of a graph stand for."""
        self.parameters = dict(zip(graph.find_nodes(op="placeholder"), tensors, strict=True))
        self.numbers = numbers
        (self.root,) = graph.output_node().all_input_nodes
        self.size = sum(node.op == "call_function" for node in graph.nodes)

    def may_end_at(self, node: fx.Node) -> bool:
        """Whether a node calls what gives the pattern's result."""
        return calls(node, self.root.target.overloadpacket)

    def match(self, node: fx.Node, known: dict[fx.Node, Any]) -> Found | Miss:
        """Match backwards from a node; `known` has the value of every node."""
        search = _Search(self, known)
        bound = next(search.calls(self.root, node, {}), None)
        if bound is None:
            return search.miss
        tensors = {name: bound[key] for key, name in self.parameters.items() if key in bound}
        numbers = {name: bound[name] for name in self.numbers.values() if name in bound}
        dying = _dying(node, list(tensors.values()))
        inside = [n for key, n in bound.items() if isinstance(key, fx.Node) and key not in self.parameters]
        shared = next((f"{n} is also used elsewhere" for n in inside if n not in dying), None)
        return Found(node, tensors, numbers, dying, shared)


class _Search:
    """One walk from a node backwards, trying both orders where they mean the same."""

    def __init__(self, pattern: Pattern, known: dict[fx.Node, Any]) -> None:
        self.pattern, self.known = pattern, known
        self.miss = Miss(0, "", ())

    def calls(self, wanted: fx.Node, node: Any, bound: _Bound) -> Iterator[_Bound]:
        """Yield each way to match a call of the pattern with a node."""
        if wanted in bound:
            if same(bound[wanted], node):
                yield bound
            return
        packet = wanted.target.overloadpacket
        if not calls(node, packet):
            self._note(bound, f"{_said(node)} stands where {packet.__name__} would")
            return
        bound = {**bound, wanted: node}
        given, asked = self._arguments(node, self.known), self._arguments(wanted, None)
        orders = [given]
        if packet in _EITHER_ORDER and given.get("alpha", 1) == 1:
            orders.append({**given, "self": given["other"], "other": given["self"]})
        for order in orders:
            pairs = [(f"{name} of {node}", asked[name], order.get(name)) for name in asked]
            yield from self._each(pairs, bound)

    def _each(self, pairs: Sequence[tuple[str, Any, Any]], bound: _Bound) -> Iterator[_Bound]:
        if not pairs:
            yield bound
            return
        (where, asked, met), *rest = pairs
        for more in self._one(where, asked, met, bound):
            yield from self._each(rest, more)

    def _one(self, where: str, asked: Any, met: Any, bound: _Bound) -> Iterator[_Bound]:
        if isinstance(asked, fx.Node) and asked not in self.pattern.parameters:
            yield from self.calls(asked, met, bound)
        elif isinstance(asked, fx.Node):
            yield from self._parameter(where, asked, met, bound)
        elif _number(asked) and asked in self.pattern.numbers:
            name = self.pattern.numbers[asked]
            if _number(met) and isinstance(met, (int, type(asked))) and bound.get(name, met) == met:
                yield {**bound, name: met}
            else:
                self._note(bound, f"{where} is {_said(met)}, not the number that is meant")
        elif isinstance(asked, (list, tuple)) and isinstance(met, (list, tuple)) and len(asked) == len(met):
            yield from self._each([(where, *pair) for pair in zip(asked, met, strict=True)], bound)
        elif _alike(asked, met):
            yield bound
        else:
            self._note(bound, f"{where} is {_said(met)} and not {asked}")

    def _parameter(self, where: str, asked: fx.Node, met: Any, bound: _Bound) -> Iterator[_Bound]:
        if not isinstance(met, fx.Node) or not isinstance(self.known.get(met), Tensor):
            self._note(bound, f"{where} is {_said(met)}, no tensor")
        elif not same(bound.get(asked, met), met):
            self._note(bound, f"{where} is {met} and not {bound[asked]}")
        else:
            yield {**bound, asked: bound.get(asked, met)}

    def _note(self, bound: _Bound, why: str) -> None:
        parameters = self.pattern.parameters
        seen = tuple(str(n) for k, n in bound.items() if isinstance(k, fx.Node) and k not in parameters)
        share = len(seen) / self.pattern.size
        if share > self.miss.share:
            self.miss = Miss(share, why, seen)

    def _arguments(self, node: fx.Node, known: dict[fx.Node, Any] | None) -> dict[str, Any]:
        """Return the arguments by name, dimensions counted from the last one, and those that change places in order."""
        given = arguments(node)
        source = given.get("self")
        value = (known.get(source) if known else source.meta["val"]) if isinstance(source, fx.Node) else None
        if isinstance(value, Tensor):
            rank = value.dim() + calls(node, aten.unsqueeze)
            given |= {name: _from_the_end(given[name], rank) for name in _DIMENSIONS if name in given}
        if calls(node, aten.transpose):
            given["dim0"], given["dim1"] = sorted((given["dim0"], given["dim1"]))
        return given


def _from_the_end(dims: Any, rank: int) -> Any:
    if isinstance(dims, (list, tuple)):
        return [_from_the_end(d, rank) for d in dims]
    return dims - rank if isinstance(dims, int) and dims >= 0 else dims


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _alike(asked: Any, met: Any) -> bool:
    if _number(asked) and _number(met):
        return bool(asked == met)
    return type(asked) is type(met) and bool(asked == met)


def _said(value: Any) -> str:
    return str(value) if isinstance(value, fx.Node) else repr(value)


def _dying(root: fx.Node, kept: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Return the calls that nothing would read without `root`, readers first; `kept` are read by what replaces it."""
    dying = {root: None}
    waiting = list(root.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node.op != "call_function" or node in dying or node in kept:
            continue
        if all(user in dying for user in node.users):
            dying[node] = None
            waiting += node.all_input_nodes
    return tuple(dying)

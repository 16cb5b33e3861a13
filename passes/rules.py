"""Rules: a rewrite as two ordinary functions, before and after, and a guard that says why not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from specqd.program import Entry, Program

from .contract import Refusal
from .pattern import Found, Miss, Pattern
from .rewrite import put_in_place
from .tracing import trace, values

__all__ = ["Rule", "apply"]

# The part of a pattern's operators beyond which a reader would ask why it does not match.
_CLOSE = 0.5


def _always(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Rule:
    """Where a graph computes what `before` does, it shall compute what `after` does.

    All three functions take the same parameters: tensors, and those annotated `float` or `int`, which stand for
    numbers that the graph has in these places. One that `before` does not read is None to the others. `before` and
    `after` give one tensor each, of the same shape and dtype.

    Attributes:
        before: traced once, on `like`. Sums and products match in either order, dimensions counted from either end.
        after: traced for each match, on tensors that have the shapes and dtypes met, and no data.
        like: examples of the tensors that `before` takes, in order; their ranks have to be those met.
        guard: why a match must stay as it is, in words; None where it need not.
    """

    before: Callable[..., Tensor]
    after: Callable[..., Tensor]
    like: tuple[Tensor, ...]
    guard: Callable[..., str | None] = _always

    @cached_property
    def numbers(self) -> dict[str, type]:
        """The parameters that stand for numbers, and of which type."""
        kinds = {"float": float, "int": int, float: float, int: int}
        parameters = inspect.signature(self.before).parameters.values()
        return {p.name: kinds[p.annotation] for p in parameters if p.annotation in kinds}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters, in order."""
        return tuple(inspect.signature(self.before).parameters)

    @cached_property
    def pattern(self) -> Pattern:
        """What `before` computes."""
        # Numbers that no model has, and that are told apart, stand for parameters.
        marks = {
            name: kind(7919 + at) if kind is int else 7919.3125 + at
            for at, (name, kind) in enumerate(self.numbers.items())
        }
        tensors = [name for name in self.names if name not in marks]
        like = [torch.empty_like(x) for x in self.like]  # one tensor twice would be one parameter
        graph = trace(lambda *given: self.before(*self._all(marks, tensors, given)), like)
        return Pattern(graph, tensors, {mark: name for name, mark in marks.items()})

    def _all(self, numbers: dict[str, Any], tensors: Sequence[str], given: Sequence[Any]) -> list[Any]:
        """Put numbers, and tensors by name, in the order of the parameters; None for what is not there."""
        known = {**numbers, **dict(zip(tensors, given, strict=True))}
        return [known.get(name) for name in self.names]

    def replacement(self, found: Found, known: dict[fx.Node, Any]) -> fx.Graph | str:
        """Return what `after` calls in the place of a match, or why the match must stay."""
        values = {name: known[node] for name, node in found.tensors.items()}
        why = found.shared or self.guard(*self._all(found.numbers, list(values), list(values.values())))
        if why:
            return why
        try:
            graph = trace(
                lambda *given: self.after(*self._all(found.numbers, list(values), given)),
                list(values.values()),
            )
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"the replacement does not take {', '.join(map(_kind, values.values()))}: {error}"
        met, made = known[found.root], graph.output_node().args[0].meta["val"]
        alike = met.dtype == made.dtype and _same_shape(met, made)
        return graph if alike else f"the replacement would give {_kind(made)} and not {_kind(met)}"

    def insert(self, graph: fx.Graph, found: Found, known: dict[fx.Node, Any]) -> fx.Node:
        """Put a replacement in the place of a match, and erase what nothing reads then."""
        made: dict[fx.Node, Any] = dict(
            zip(graph.find_nodes(op="placeholder"), found.tensors.values(), strict=True)
        )
        result = graph.output_node().args[0]
        for node in [n for n in graph.nodes if n.op == "call_function"]:
            args, kwargs = (map_arg(a, made.__getitem__) for a in (node.args, node.kwargs))
            made[node] = put_in_place(found.root, node.target, args, kwargs, instead=node is result)
            known[made[node]] = node.meta["val"]
        found.root.replace_all_uses_with(made[result])
        for dead in found.dying:
            dead.graph.erase_node(dead)
        return made[result]


def apply(program: Program, entry: Entry, rules: Sequence[Rule]) -> Iterator[fx.Node | Refusal]:
    """Apply rules to an entry, the first one everywhere before the next, yielding what a pass yields.

    Refused are matches that a guard keeps, values inside that others read too, and rules that ask of an open size what
    holds for some sizes alone; and what matches more than half of a rule's operators and then something else, which is
    told of the rule that comes furthest.
    """
    known: dict[fx.Node, Any] = {}
    refusals: dict[str, Refusal] = {}
    misses: dict[str, Miss] = {}
    for rule in rules:
        erased: set[fx.Node] = set()
        for node in [n for n in entry.graph.nodes if rule.pattern.may_end_at(n)]:
            if node in erased:
                continue
            known = known or values(program, entry)
            found = rule.pattern.match(node, known)
            if isinstance(found, Miss):
                misses[node.name] = max(misses.get(node.name, found), found, key=lambda miss: len(miss.seen))
                continue
            asked = known[node].fake_mode.shape_env.guards
            before = len(asked)
            made = rule.replacement(found, known)
            if len(asked) > before:  # torch took the example's sizes for the answer
                made = f"the rule is for {asked[before].expr} alone, of a size that is open"
                known = {}
            if isinstance(made, str):
                refusals.setdefault(node.name, Refusal(node.name, made))
            else:
                erased.update(found.dying)
                yield rule.insert(made, found, known)
    yield from _refused(entry, refusals, misses)


def _refused(entry: Entry, refusals: dict[str, Refusal], misses: dict[str, Miss]) -> Iterator[Refusal]:
    """Yield what is still there to be refused after all rules."""
    alive = {node.name for node in entry.graph.nodes}
    yield from (refusal for name, refusal in refusals.items() if name in alive)
    for name, miss in misses.items():
        if miss.share > _CLOSE and name not in refusals and alive.issuperset({name, *miss.seen}):
            yield Refusal(name, miss.why)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    sizes = zip(a.shape, b.shape, strict=False)
    return a.dim() == b.dim() and all(statically_known_true(x == y) for x, y in sizes)


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"

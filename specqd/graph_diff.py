"""What two programs compute differently: their operators paired up in order, and their weights by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import torch
from torch import fx

from specqd.program import Entry, Program, module_of

__all__ = ["Change", "called", "diff_programs", "formatted"]


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        sign: `-` only in the first program, `+` only in the second, `~` in both but not alike.
        module: the module of the model it belongs to; empty for weights and for what has none.
        what: the call, or the weight.
        became: what it is in the second program, of a change.
    """

    sign: Literal["-", "+", "~"]
    module: str
    what: str
    became: str = ""


def diff_programs(a: Program, b: Program, entry: str | None = None) -> list[Change]:
    """Compare an entry (default: the target) of two programs; nothing if it computes the same in the same way.

    Nodes are paired by what they call, with which numbers; names and unused weights do not matter, those of weights and
    inputs do, and of what kind they are. Raises InputError if a program lacks the entry.
    """
    first, second = (p.target if entry is None else p.entry(entry) for p in (a, b))
    return [*_nodes(first, second), *_inputs(first, second), *_weights(a, first, b, second)]


def _nodes(a: Entry, b: Entry) -> Iterator[Change]:
    old, new = (list(entry.graph.nodes) for entry in (a, b))
    blocks = SequenceMatcher(
        None, list(map(called, old)), list(map(called, new)), autojunk=False
    ).get_opcodes()
    pairs = {
        old[i]: new[j]
        for kind, i0, i1, j0, j1 in blocks
        if kind == "equal"
        for i, j in zip(range(i0, i1), range(j0, j1), strict=True)
    }
    paired = set(pairs.values())
    for kind, i0, i1, j0, j1 in blocks:
        if kind == "equal":
            for node in old[i0:i1]:
                if _reads_others(node, pairs[node], pairs, paired):
                    yield Change("~", module_of(node), formatted(node), formatted(pairs[node]))
            continue
        yield from (Change("-", module_of(node), formatted(node)) for node in old[i0:i1])
        yield from (Change("+", module_of(node), formatted(node)) for node in new[j0:j1])


def _reads_others(old: fx.Node, new: fx.Node, pairs: dict[fx.Node, fx.Node], paired: set[fx.Node]) -> bool:
    """Whether two like calls have other arguments; what stands in another's place is told where it stands."""
    before, after = old.all_input_nodes, new.all_input_nodes
    return len(before) != len(after) or any(
        pairs.get(a) is not b and (a in pairs or b in paired) for a, b in zip(before, after, strict=True)
    )


def _inputs(a: Entry, b: Entry) -> Iterator[Change]:
    new = {given.name: given for given in b.inputs}
    for given in a.inputs:
        if given.name in new and str(given) != str(new[given.name]):
            yield Change("~", "", f"input {given}", f"input {new[given.name]}")


def _weights(a: Program, first: Entry, b: Program, second: Entry) -> Iterator[Change]:
    old, new = (
        {name: p.weights[name] for name in p.used_weights(entry.name)}
        for p, entry in ((a, first), (b, second))
    )
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield Change("-", "", f"weight {name} {_kind(old[name])}")
        elif name not in old:
            yield Change("+", "", f"weight {name} {_kind(new[name])}")
        elif _kind(old[name]) != _kind(new[name]):
            yield Change("~", "", f"weight {name} {_kind(old[name])}", f"weight {name} {_kind(new[name])}")
        elif not torch.equal(old[name], new[name]):
            part = (old[name] != new[name]).double().mean().item()
            yield Change(
                "~", "", f"weight {name} {_kind(old[name])}", f"the same, {part:.1%} of its elements new"
            )


def formatted(node: fx.Node) -> str:
    """Give a node as `name = operator(arguments)`, without the namespace of ATen."""
    if node.op == "output":
        return f"output {_text(node.args[0])}"
    if node.op != "call_function":
        return f"{'input' if node.op == 'placeholder' else 'weight'} {node.target}"
    given = [*map(_text, node.args), *(f"{name}={_text(value)}" for name, value in node.kwargs.items())]
    return f"{node.name} = {_operator(node)}({', '.join(given)})"


def _operator(node: fx.Node) -> str:
    packet = str(getattr(node.target, "overloadpacket", getattr(node.target, "__name__", node.target)))
    return packet.removeprefix("aten.")


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return str(value).removeprefix("torch.") if isinstance(value, (fx.Node, torch.dtype)) else repr(value)


def called(node: fx.Node) -> str:
    """Give what a node calls, with `*` for the nodes among its arguments."""
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"

    def blank(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [blank(v) for v in value]
        return "*" if isinstance(value, fx.Node) else (type(value).__name__, str(value))

    kwargs = sorted((name, blank(value)) for name, value in node.kwargs.items())
    return f"{node.op} {node.target} {blank(node.args)} {kwargs}"


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

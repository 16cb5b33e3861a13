"""Words for changing a graph, so that every change carries its origin along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from specqd.program import Entry, KVCache, Program, State

__all__ = [
    "add_weight",
    "declare",
    "plain_name",
    "put_in_place",
    "read_weight",
    "rename_placeholder",
    "replace",
]

_DESCRIBES_THE_PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def replace(old: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """Put a new call in the place of `old` and hand it `old`'s users; `old` dies with the pass.

    The new node keeps where in the model's source it comes from, and its metadata entry `replaces` is `old`'s
    name.
    """
    return put_in_place(old, target, args, {}, instead=True)


def put_in_place(
    old: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, instead: bool
) -> fx.Node:
    """Put a new call in front of `old`, from the same place of the model, and `instead` of it as `replace` does."""
    with old.graph.inserting_before(old):
        new = old.graph.create_node("call_function", target, args, kwargs, name=plain_name(target))
    new.meta = {key: old.meta[key] for key in _DESCRIBES_THE_PLACE if key in old.meta}
    if instead:
        new.meta["replaces"] = old.name
        old.replace_all_uses_with(new)
    return new


def plain_name(target: Callable[..., Any]) -> str:
    """Name a call's node after the operator alone, without its overload: `rms_norm`."""
    return getattr(target, "overloadpacket", target).__name__


def add_weight(program: Program, name: str, tensor: torch.Tensor) -> str:
    """Store a weight and return its name: one of the same bits is shared, and another one has it with a suffix."""
    unique, count = name, 2
    while unique in program.weights:
        if _same_bits(program.weights[unique], tensor):
            return unique
        unique, count = f"{name}~{count}", count + 1
    program.weights[unique] = tensor.contiguous()
    return unique


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Unlike `==`, tell zeros of unlike signs apart."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (x.reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(one, other)


def declare(program: Program, entry: Entry, kept: KVCache | State) -> list[fx.Node]:
    """Let a program keep something between calls, and return the placeholders, behind all others, that are it."""
    if isinstance(kept, KVCache):
        program.caches[kept.name] = kept
    else:
        program.states[kept.name] = kept
    made = entry.graph.find_nodes(op="placeholder")
    for name in kept.placeholders:
        with entry.graph.inserting_after(made[-1]):
            made.append(entry.graph.placeholder(name))
    return made[-len(kept.placeholders) :]


def read_weight(before: fx.Node, name: str) -> fx.Node:
    """Make a node that reads a stored weight, in front of another node."""
    with before.graph.inserting_before(before):
        return before.graph.create_node("get_attr", name)


def rename_placeholder(node: fx.Node, name: str) -> fx.Node:
    """Replace a placeholder by one of another name, in the same position."""
    with node.graph.inserting_before(node):
        new = node.graph.placeholder(name)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new

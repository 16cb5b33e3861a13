"""Find isomorphic layers in a graph, so that they become one loop over stacked weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["Loop", "cache_layers", "find_loop"]

_ATTENTION = "cached_attention"
#: position of `layer` among the arguments of cached_attention
LAYER_ARGUMENT = 7


@dataclass(frozen=True)
class Loop:
    """Alike bodies, and what flows from one to the next.

    `bodies[i]` are the nodes of iteration i, alike one by one; `carried` pairs a value of the code before the loop
    with the node of the last body that takes its place.
    """

    bodies: tuple[tuple[fx.Node, ...], ...]
    carried: tuple[tuple[fx.Node, fx.Node], ...]


def find_loop(nodes: list[fx.Node]) -> Loop | None:
    """Return the longest run of alike layers among `nodes` (calls, in order), or None when there is none."""
    anchors = [i for i, n in enumerate(nodes) if _ATTENTION in str(n.target)]
    best: Loop | None = None
    for period in range(1, len(anchors) // 2 + 1):
        for skip in range(min(3, len(anchors))):
            loop = _try(nodes, anchors[skip:], period)
            if loop and (best is None or _covered(loop) > _covered(best)):
                best = loop
        if best is not None and period >= 2:
            break
    return best


def cache_layers(column: Sequence[fx.Node]) -> tuple[int, ...] | None:
    """The cache layer of one attention node in every body; None for other nodes."""
    if _ATTENTION not in str(column[0].target):
        return None
    return tuple(int(n.args[LAYER_ARGUMENT]) for n in column)


def _covered(loop: Loop) -> int:
    return len(loop.bodies) * len(loop.bodies[0])


def _try(nodes: list[fx.Node], anchors: list[int], period: int) -> Loop | None:
    heads = anchors[::period]
    if len(anchors) % period:
        heads = heads[:-1]
    if len(heads) < 2:
        return None
    size = heads[1] - heads[0]
    count = next((i for i in range(1, len(heads)) if heads[i] - heads[i - 1] != size), len(heads))
    heads = heads[:count]
    if count < 2:
        return None
    back = 0
    while back < size - 1 and heads[0] - back > 0 and _alike([nodes[h - back - 1] for h in heads]):
        back += 1
    while count >= 2:
        loop = _build(nodes, [h - back for h in heads[:count]], size)
        if loop:
            return loop
        count -= 1
        if count < len(heads) - 1:
            return None
    return None


def _build(nodes: list[fx.Node], starts: list[int], size: int) -> Loop | None:
    if starts[-1] + size > len(nodes):
        return None
    bodies = tuple(tuple(nodes[s : s + size]) for s in starts)
    if not all(_alike(list(column)) for column in zip(*bodies, strict=True)):
        return None
    carried = _carried(bodies)
    if carried is None:
        return None
    outputs = {last for _, last in carried}
    inside = {n for body in bodies for n in body}
    for body in bodies:
        later = inside if body is not bodies[-1] else set(bodies[-1])
        for n in body:
            escapes = [u for u in n.users if u not in later]
            if escapes and not (body is bodies[-1] and n in outputs):
                return None
    return Loop(bodies, carried)


def _alike(column: list[fx.Node]) -> bool:
    return len({_signature(n) for n in column}) == 1


def _signature(node: fx.Node) -> str:
    args = list(node.args)
    if _ATTENTION in str(node.target):
        args[LAYER_ARGUMENT] = 0
    return f"{node.target} {_describe(args)} {_describe(dict(node.kwargs))} {_shape(node)}"


def _describe(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"{'w' if value.op == 'get_attr' else 'n'}{_shape(value)}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_describe(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_describe(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    stored = node.meta.get("stored")
    return (
        f"{tuple(value.shape)}{value.dtype}{stored or ''}" if isinstance(value, torch.Tensor) else repr(value)
    )


def _carried(bodies: tuple[tuple[fx.Node, ...], ...]) -> tuple[tuple[fx.Node, fx.Node], ...] | None:
    """Say what flows from body to body; None if an input is neither own, nor carried, nor the same for all."""
    places = [{n: i for i, n in enumerate(body)} for body in bodies]
    carried: dict[fx.Node, fx.Node] = {}
    for column in zip(*bodies, strict=True):
        for inputs in zip(*(n.all_input_nodes for n in column), strict=True):
            own = {places[i].get(x) for i, x in enumerate(inputs)}
            before = {places[i].get(x) for i, x in enumerate(inputs[1:])}
            if inputs[0].op == "get_attr" or _one_place(own) or len(set(inputs)) == 1:
                continue
            if not _one_place(before):
                return None
            last = bodies[-1][places[0][inputs[1]]]
            if carried.setdefault(inputs[0], last) is not last:
                return None
    return tuple(carried.items()) if len(set(carried.values())) == len(carried) else None


def _one_place(places: set[int | None]) -> bool:
    return len(places) == 1 and None not in places

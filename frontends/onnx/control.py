"""Control flow whose course is known when the graph is captured: branches are chosen, loops unrolled."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specqd.errors import CaptureError

from .graph import Graph, Node
from .values import Value, is_known, known, numbers, plain, tensor

if TYPE_CHECKING:
    from .running import OnnxModule

__all__ = ["CONTROL"]

Values = MutableMapping[str, Value]

_ROUNDS = 1024


def _if(module: OnnxModule, node: Node, given: list[Value], values: Values) -> tuple[Value, ...]:
    """The branch that is taken; or both, and a choice, where the condition is computed and shapes are the same."""
    branches = [_body(node, key) for key in ("then_branch", "else_branch")]
    (condition,) = given
    if is_known(condition):
        return module.body(branches[0 if _truth(node, condition) else 1], (), values)
    parts = [[module.traced(tensor(v)) for v in module.body(branch, (), values)] for branch in branches]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(*parts, strict=True)):
        raise CaptureError(
            f"{node}: its condition is computed, and its branches give other shapes; it is not compiled"
        )
    return tuple(torch.where(condition.reshape(()), a, b) for a, b in zip(*parts, strict=True))


def _loop(module: OnnxModule, node: Node, given: list[Value], values: Values) -> tuple[Value, ...]:
    """As many rounds as are known to be there, each with nodes of its own."""
    body = _body(node, "body")
    count, condition, *carried = given
    rounds = plain(count, f"{node}: its number of rounds")
    going = condition is None or _truth(node, condition)
    rounds = rounds[0] if isinstance(rounds, list) else rounds
    scanned: list[list[Value]] = []
    done = 0
    _demand_few(node, rounds or 0)
    while going and (rounds is None or done < rounds):
        _demand_few(node, done)
        going_on, *results = module.body(body, (known(done), known(True, torch.bool), *carried), values)
        carried, parts = results[: len(carried)], results[len(carried) :]
        scanned.append(parts)
        going, done = _truth(node, going_on), done + 1
    kept = len(body.outputs) - 1 - len(carried)
    return (*carried, *(_stacked(module, node, [parts[at] for parts in scanned], 0) for at in range(kept)))


def _scan(module: OnnxModule, node: Node, given: list[Value], values: Values) -> tuple[Value, ...]:
    """A round for each element along an axis of what is scanned."""
    body = _body(node, "body")
    count = int(node.attributes["num_scan_inputs"])
    states, series = (
        given[: len(given) - count],
        [module.traced(tensor(v)) for v in given[len(given) - count :]],
    )
    axes = node.attributes.get("scan_input_axes") or [0] * count
    backward = node.attributes.get("scan_input_directions") or [0] * count
    length = series[0].shape[axes[0]]
    if not isinstance(length, int):
        raise CaptureError(f"{node}: the length that it scans is left open; fix it with dynamic_shapes")
    scanned: list[list[Value]] = []
    for at in range(length):
        _demand_few(node, at)
        parts = [
            x.select(a, length - 1 - at if b else at) for x, a, b in zip(series, axes, backward, strict=True)
        ]
        results = list(module.body(body, (*states, *parts), values))
        states, found = results[: len(states)], results[len(states) :]
        scanned.append(found)
    kept = len(body.outputs) - len(states)
    places = node.attributes.get("scan_output_axes") or [0] * kept
    turned = node.attributes.get("scan_output_directions") or [0] * kept
    outputs = []
    for at in range(kept):
        parts = [found[at] for found in scanned]
        outputs.append(_stacked(module, node, parts[::-1] if turned[at] else parts, places[at]))
    return (*states, *outputs)


def _body(node: Node, key: str) -> Graph:
    graph = node.attributes.get(key)
    if not isinstance(graph, Graph):
        raise CaptureError(f"{node}: it has no graph {key!r}; the file is damaged")
    return graph


def _truth(node: Node, condition: Value) -> bool:
    if not is_known(condition):
        raise CaptureError(f"{node}: when it ends depends on the data, which is not compiled")
    return bool(np.all(numbers(condition)))


def _demand_few(node: Node, done: int) -> None:
    if done > _ROUNDS:
        raise CaptureError(f"{node}: it has more than {_ROUNDS} rounds, which are not unrolled")


def _stacked(module: OnnxModule, node: Node, parts: list[Value], axis: int) -> Value:
    if not parts:
        raise CaptureError(f"{node}: it has no round, so that the shape of what it collects is not known")
    return torch.stack([module.traced(tensor(part)) for part in parts], axis)


CONTROL: dict[str, Callable[[Any, Node, list[Value], Values], tuple[Value, ...]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
}
"""Operators that run graphs."""

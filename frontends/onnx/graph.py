"""An ONNX graph as it is run: nodes whose attributes are plain values, and tensors of torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from onnx import NodeProto
from torch import Tensor

from .coded import Coded

__all__ = ["Function", "Given", "Graph", "Node", "Reference"]


@dataclass(frozen=True)
class Reference:
    """An attribute of a function's node that has the value of the function's own attribute `name`."""

    name: str


@dataclass(frozen=True)
class Node:
    """One node: `inputs` are names of values, "" for what is left out.

    Attributes are int, float, str, Tensor, Graph, or lists of them. `opset` is that of its domain in its model.
    `types` are the numbers of its inputs' types, once it runs. `proto` is what it was read from.
    """

    op: str
    name: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(repr=False)
    types: tuple[int, ...] = ()
    proto: NodeProto | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """Name it as messages do."""
        called = self.name or next(filter(None, self.outputs), "")
        kind = f"{self.domain}.{self.op}" if self.domain else self.op
        return f"the node {called!r} ({kind})" if called else f"a node {kind}"

    def resolved(self, given: dict[str, Any]) -> Node:
        """Put values in the place of references; those that are not given are left out."""
        attributes = {
            key: given.get(value.name) if isinstance(value, Reference) else value
            for key, value in self.attributes.items()
        }
        attributes = {key: value for key, value in attributes.items() if value is not None}
        bodies = {k: v.resolved(given) for k, v in attributes.items() if isinstance(v, Graph)}
        return replace(self, attributes=attributes | bodies)


@dataclass(frozen=True)
class Given:
    """An input of a graph: its type, and a size for each dimension: a number, a name, or None; None for any rank."""

    name: str
    type: int
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run."""

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Given, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, Tensor | Coded] = field(repr=False)

    def resolved(self, given: dict[str, Any]) -> Graph:
        """Put values in the place of the references of its nodes."""
        return replace(self, nodes=tuple(node.resolved(given) for node in self.nodes))


@dataclass(frozen=True)
class Function:
    """A function of a model, or the definition of an operator by others."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    defaults: dict[str, Any]

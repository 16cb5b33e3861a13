"""Run an ONNX graph in torch, so that torch.export can trace it: node by node, folding what is known."""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from specqd.errors import CaptureError, SpecqdError

from .coded import Coded, is_coded, is_wide, kept
from .control import CONTROL
from .expansion import expansion, type_of
from .graph import Function, Graph, Node
from .rules import Rule, arguments, found
from .sizes import SIZES
from .tensors import name_of
from .values import Value, is_known, is_symbolic, plain, tensor

__all__ = ["OnnxModule"]

Values = MutableMapping[str, Value]

#: bytes that a node may make of what is known, beyond what it is given
_FOLDED = 1 << 28
_DEPTH = 32
#: nodes that may run, those of functions and of rounds of loops each time
_NODES = 1 << 17


class OnnxModule(nn.Module):
    """A graph as a module: its inputs in their order, its outputs in a tuple.

    What depends on initialisers alone is computed when the module is made. The others are its buffers, named after
    their values.
    """

    def __init__(
        self, graph: Graph, functions: dict[tuple[str, str], Function], bound: dict[str, Any]
    ) -> None:
        """Take inputs in `bound` for known."""
        super().__init__()
        self.graph, self.functions = graph, functions
        self.inputs = [given for given in graph.inputs if given.name not in bound]
        self.known: dict[str, Value] = {**graph.tensors, **bound}
        self.depth = self.count = 0
        self.rest: list[Node] = []
        self.held: dict[int, str] = {}
        for node in graph.nodes:
            if self._is_foldable(node):
                self.run([node], self.known)
            else:
                self.rest.append(node)
        # torch.export names inputs after the parameters that it sees here.
        self.forward = lambda *inputs: self._run(*inputs)
        self.forward.__signature__ = _signature(  # type: ignore[attr-defined]
            [given.name for given in self.inputs]
        )
        needed = {name for node in self.rest for name in node.inputs} | set(graph.outputs)
        if any(node.op in CONTROL for node in self.rest):
            needed |= self.known.keys()  # graphs of attributes may read any
        for name, value in self.known.items():
            if name in needed:
                self._hold(name, value)

    def _is_foldable(self, node: Node) -> bool:
        if node.op in CONTROL or any(name and name not in self.known for name in node.inputs):
            return False
        rule = None if (node.domain, node.op) in self.functions else found(node)
        return rule is None or not rule.keeps(node, [self.known[n] if n else None for n in node.inputs])

    def _hold(self, name: str, value: Value) -> None:
        held = value.codes if isinstance(value, Coded) else value
        if not is_known(held) or held is None or id(held) in self.held:
            return
        plain_name = re.sub(r"\W", "_", name) or "_"
        while hasattr(self, plain_name):
            plain_name += "_"
        self.register_buffer(plain_name, held)
        self.held[id(held)] = plain_name

    def _run(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the nodes that are left."""
        given = {
            one.name: Coded(x, one.type) if is_coded(one.type) else x
            for one, x in zip(self.inputs, inputs, strict=True)
        }
        values: Values = ChainMap(given, self.known)
        self.count = 0
        self.run(self.rest, values)
        return tuple(self._result(name, values[name]) for name in self.graph.outputs)

    def _result(self, name: str, value: Value) -> Any:
        if value is None:
            raise CaptureError(f"the output {name!r} is left out by the node that should give it")
        return self.traced(value.codes if isinstance(value, Coded) else tensor(value))

    def traced(self, value: Value) -> Value:
        """Return the buffer that holds a known value; other values stay as they are."""
        if isinstance(value, Coded):
            return Coded(self.traced(value.codes), value.type)
        return getattr(self, self.held[id(value)]) if id(value) in self.held else value

    def run(self, nodes: Iterable[Node], values: Values) -> None:
        """Run nodes, adding what they give to `values`."""
        for node in nodes:
            self.count += 1
            if self.count > _NODES:
                raise CaptureError(f"{node}: more than {_NODES} nodes run before it; the model is refused")
            given = [values[name] if name else None for name in node.inputs]
            try:
                results = self._results(node, given, values)
            except SpecqdError:
                raise
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
                raise CaptureError(f"{node}: {type(error).__name__}: {lines[0]}") from error
            values.update((name, result) for name, result in zip(node.outputs, results, strict=False) if name)
            lost = [name for name in node.outputs[len(results) :] if name]
            if lost:
                raise CaptureError(f"{node}: its output {lost[0]!r} is not computed")

    def _results(self, node: Node, given: list[Value], values: Values) -> tuple[Value, ...]:
        if node.op in CONTROL and not node.domain:
            return CONTROL[node.op](self, node, given, values)
        function = self.functions.get((node.domain, node.op))
        rule = None if function else found(node)
        if rule is not None and (results := self._by_rule(rule, node, given)) is not None:
            return results
        if function is None:
            with _disable_current_modes():  # its constants are known
                function = expansion(node, given)
        return self._call(node, function, given)

    def _by_rule(self, rule: Rule, node: Node, given: list[Value]) -> tuple[Value, ...] | None:
        """Return what a rule gives; None if it leaves the node to the operator's own definition."""
        if (
            any(map(is_symbolic, given))
            and node.op in SIZES
            and all(is_symbolic(v) or is_known(v) for v in given)
        ):
            result = SIZES[node.op](node, *map(_array, given), **node.attributes)
            if result is not NotImplemented:
                return (result,)
        if not all(map(is_known, given)) or rule.keeps(node, given):
            return self._applied(rule, node, given, self.traced)
        with _disable_current_modes(), torch.no_grad():

            def apply() -> tuple[Value, ...] | None:
                return self._applied(rule, node, given, lambda value: value)

            if given:
                _demand_small(node, given, lambda: apply() or ())
            return apply()

    def _applied(
        self, rule: Rule, node: Node, given: list[Value], taken: Callable[[Value], Value]
    ) -> tuple[Value, ...] | None:
        node, inputs = replace(node, types=tuple(0 if v is None else type_of(v) for v in given)), []
        for at, value in enumerate(given):
            where = f"{node}: its input {node.inputs[at]!r}"
            if at in rule.plain or (at in rule.maybe and (is_known(value) or is_symbolic(value))):
                inputs.append(plain(value, where))
            elif at in rule.known and is_known(value):
                inputs.append(value)
            elif isinstance(value, Coded) and is_wide(value.type) and not rule.coded:
                inputs.append(taken(value).codes)
            elif isinstance(value, Coded) and not rule.coded:
                raise CaptureError(f"{where} is of type {name_of(value.type)}; cast it to FLOAT before")
            else:
                inputs.append(tensor(taken(value)) if is_symbolic(value) else taken(value))
        bound = arguments(rule, node, inputs)
        result = rule.function(*bound.args, **bound.kwargs)
        if result is NotImplemented:
            return None
        results = result if isinstance(result, tuple) else (result,)
        wide = any(map(is_wide, node.types)) and not rule.coded
        return _like_inputs(node, results) if wide else results

    def _call(self, node: Node, function: Function, given: list[Value]) -> tuple[Value, ...]:
        self.depth += 1
        if self.depth > _DEPTH:
            raise CaptureError(f"{node}: functions call each other more than {_DEPTH} deep; it is refused")
        if len(given) > len(function.inputs):
            raise CaptureError(
                f"{node}: it has {len(given)} inputs, and its function takes {len(function.inputs)}"
            )
        attributes = {**function.defaults, **node.attributes}
        inside: Values = dict.fromkeys(function.inputs) | dict(zip(function.inputs, given, strict=False))
        self.run([inner.resolved(attributes) for inner in function.nodes], inside)
        self.depth -= 1
        return tuple(inside.get(name) for name in function.outputs)

    def body(self, graph: Graph, given: Iterable[Value], values: Values) -> tuple[Value, ...]:
        """Run a graph of an attribute on values, within those around it."""
        names = [one.name for one in graph.inputs]
        inner: Values = ChainMap({**graph.tensors, **dict(zip(names, given, strict=True))}, values)
        self.run(graph.nodes, inner)
        return tuple(inner[name] for name in graph.outputs)


def _like_inputs(node: Node, results: tuple[Value, ...]) -> tuple[Value, ...]:
    """Hold as a wide type what, by the operator's definition, has the type of an input that is."""
    schema = onnx.defs.get_schema(node.op, node.opset, node.domain)
    inputs = [schema.inputs[min(at, len(schema.inputs) - 1)].type_str for at in range(len(node.types))]
    types = {text: kind for text, kind in zip(inputs, node.types, strict=True) if is_wide(kind)}
    outputs = [schema.outputs[min(at, len(schema.outputs) - 1)].type_str for at in range(len(results))]
    return tuple(
        kept(value, types[text]) if text in types and value is not None else value
        for text, value in zip(outputs, results, strict=True)
    )


def _array(value: Value) -> Any:
    if value is None or is_symbolic(value):
        return value
    with _disable_current_modes():
        return value.numpy()


def _signature(names: list[str]) -> inspect.Signature:
    known: dict[str, None] = {}
    for name in names:
        own = re.sub(r"\W", "_", name) or "_"
        own = f"input_{own}" if keyword.iskeyword(own) or not own.isidentifier() else own
        while own in known:
            own += "_"
        known[own] = None
    return inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in known])


def _demand_small(node: Node, given: list[Value], apply: Callable[[], tuple[Value, ...]]) -> None:
    """Refuse to compute from little what would fill the memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = _bytes(apply())
    more = made - _bytes({id(value): value for value in given}.values())
    if more > _FOLDED:
        raise CaptureError(f"{node}: it makes {more / 1e9:.1f} GB of constants; the model is refused")


def _bytes(values: Iterable[Value]) -> int:
    """Return what values take, eight bytes an element."""
    return sum(8 * math.prod(value.shape) for value in values if isinstance(value, torch.Tensor | Coded))

"""Lower one entry, for a fixed number of rows, to one TIR function of one parallel launch."""

from __future__ import annotations

import operator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from tvm.script.ir_builder import IRBuilder

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.argmax import argmax
from specqd.codegen.lower.layers import Loop, cache_layers, find_loop
from specqd.codegen.lower.operators import OPERATORS
from specqd.codegen.lower.pointwise import ELEMENTWISE, SCALAR_ONLY, combine
from specqd.codegen.lower.step import Parameter, Step
from specqd.codegen.lower.values import Value, constant, of_buffer
from specqd.codegen.lower.viewing import VIEWS
from specqd.codegen.pack import Packed
from specqd.codegen.tir import I, i32, tirx
from specqd.errors import CodegenError
from specqd.program import Entry, Program

__all__ = ["Function", "lower"]

_DTYPES = {torch.float32: "float32", torch.int64: "int32", torch.int32: "int32", torch.bool: "bool"}
_MATRIX = ("aten.linear", "specqd.linear_mxfp4", "specqd.linear_int8")


def lower(
    program: Program, entry: Entry, isa: ISA, rows: int, symbol: str, adjacent: bool = False
) -> tuple[Any, list[Parameter]]:
    """Return the PrimFunc `symbol` and its parameters in order; the graph's shapes must be propagated for `rows`.

    `adjacent`: the rows will be consecutive positions of one sequence, not any positions of any.

    Raises CodegenError naming the first construct that cannot be compiled, with its place in the model.
    """
    function = Function(program, entry, isa, rows, adjacent=adjacent)
    with IRBuilder() as builder, _prelude(isa), I.attr(0, "pragma_parallel_launch_point", 1):
        function.emit()
    parameters = list(function.step.parameters.values())
    body = builder.get()
    prim = tirx.PrimFunc([p.buffer for p in parameters], body)
    return prim.with_attr({"global_symbol": symbol, "tirx.noalias": True}), parameters


def _prelude(isa: ISA) -> Any:
    return I.attr(0, "pragma_import_llvm", isa.prelude) if isa.prelude else nullcontext()


class Function:
    """The walk over a graph: which nodes become phases, which stay expressions."""

    def __init__(
        self,
        program: Program,
        entry: Entry,
        isa: ISA,
        rows: int,
        *,
        profile: bool = False,
        adjacent: bool = False,
    ) -> None:
        """Prepare to lower `entry` for `rows` tokens."""
        self.program, self.entry, self.isa, self.adjacent = program, entry, isa, adjacent
        self.step = Step(isa, rows, profile)
        self.space = self.step.space
        self.env: dict[fx.Node, Any] = {}
        self.tokens = self.step.parameter("tokens", "tokens", "int32", (rows,))
        self.positions = self.step.parameter("positions", "positions", "int32", (rows,))
        self.tables = self.step.parameter("tables", "tables", "int32", (rows,))
        self.blocks = self.step.blocks()
        self.stacks: dict[fx.Node, tuple[fx.Node, ...]] = {}
        output = next(n for n in entry.graph.nodes if n.op == "output").args[0]
        self.output = output if isinstance(output, fx.Node) else output[0]
        size = self.output.meta["val"].numel()
        self.into = {self.output: self.step.parameter("logits", "logits", "float32", (size,))}
        self.layers: dict[fx.Node, tuple[Any, int]] = {}

    # -- the walk -----------------------------------------------------------------------------------------------

    def emit(self) -> None:
        """Emit the whole function: code before the layers, their loop, code after, the greedy choice."""
        for n in self.entry.graph.nodes:
            if n.op == "get_attr":
                n.meta["stored"] = str(self.program.weights[str(n.target)].dtype)
        self._placeholders()
        nodes = [n for n in self.entry.graph.nodes if n.op == "call_function"]
        loop = find_loop(nodes)
        if loop is None:
            self._run(nodes)
        else:
            first, last = nodes.index(loop.bodies[0][0]), nodes.index(loop.bodies[-1][-1])
            self._run(nodes[:first])
            self._loop(loop)
            self._run(nodes[last + 1 :])
        self._finish()

    def _placeholders(self) -> None:
        tokens, positions = self.tokens, self.positions
        for n in self.entry.graph.nodes:
            if n.op != "placeholder":
                continue
            shape = tuple(n.meta["val"].shape)
            if n.target == "tokens":
                self.env[n] = Value(shape, "int32", lambda i: tokens[i[1]], vectorises=False)
            elif n.target == "positions":
                self.env[n] = Value(shape, "int32", lambda i: positions[i[1]], vectorises=False)
            else:
                self.env[n] = str(n.target)

    def _run(self, nodes: list[fx.Node]) -> None:
        done: set[fx.Node] = set()
        for n in nodes:
            if n in done or n in self.env:
                continue
            chain = self._epilogue(n, set(nodes)) if self.is_matrix(n) else []
            self.step.label = n.name
            value = self.lower_node(n, chain)
            done.update(chain)
            self.env[chain[-1] if chain else n] = self._settle(chain[-1] if chain else n, value)

    def _loop(self, loop: Loop) -> None:
        template = loop.bodies[0]
        attentions: dict[fx.Node, tuple[int, ...]] = {}
        for column in zip(*loop.bodies, strict=True):
            for sources in zip(*(n.all_input_nodes for n in column), strict=True):
                if sources[0].op == "get_attr":
                    self.stacks[sources[0]] = sources
            if places := cache_layers(column):
                attentions[column[0]] = places
        outer = dict(self.env)
        results: dict[fx.Node, Value] = {}
        offset = {n: i for i, n in enumerate(loop.bodies[-1])}
        for before, last in loop.carried:
            value = self.env[before]
            held = self.step.materialise(value, self.step.scratch(value.size, value.dtype))
            self.env[before] = held
            inner = template[offset[last]]
            self.into[inner] = held.buffer
            results[last] = held
        with I.serial(0, len(loop.bodies)) as layer:
            self.step.iteration = self.space.bound(layer, len(loop.bodies))
            self.layers = {node: _spacing(places, layer) for node, places in attentions.items()}
            self._run(list(template))
        self.step.iteration = None
        self.env = {**outer, **results}

    def _settle(self, node: fx.Node, value: Any) -> Any:
        """Decide whether a value is computed now (several readers, or a fixed destination) or where it is read."""
        if not isinstance(value, Value):
            return value
        if node in self.into:
            destination = self.into[node]
            return value if value.buffer is destination else self.step.materialise(value, destination)
        if value.buffer is not None or node.target in VIEWS or value.dtype != "float32":
            return value
        readers = _readers(node)
        if len(readers) > 1 and not all(self.is_matrix(r) for r in readers):
            return self.step.materialise(value)
        return value

    def _epilogue(self, node: fx.Node, region: set[fx.Node]) -> list[fx.Node]:
        """Elementwise nodes that can be applied to a matrix product while it is in registers."""
        chain = [node]
        shape = tuple(node.meta["val"].shape)
        while len(chain[-1].users) == 1 and chain[-1] not in self.into:
            user = next(iter(chain[-1].users))
            others = [a for a in user.all_input_nodes if a is not chain[-1] and a.op != "get_attr"]
            fits = user.target in ELEMENTWISE and user.target not in SCALAR_ONLY and user in region
            if not fits or tuple(user.meta["val"].shape) != shape or any(a not in self.env for a in others):
                break
            chain.append(user)
        return chain

    def is_matrix(self, node: fx.Node) -> bool:
        """Say whether a node is a product with a weight matrix."""
        return str(node.target).startswith(_MATRIX) or str(node.target).rsplit(".", 1)[0] in _MATRIX

    # -- nodes --------------------------------------------------------------------------------------------------

    def lower_node(self, node: fx.Node, chain: list[fx.Node]) -> Any:
        """Lower one node (a matrix product together with its epilogue) to a value, or to what its meta holds."""
        if not _is_tensor(node) and not isinstance(node.meta["val"], list | tuple):
            return node.meta["val"]
        try:
            if node.target is operator.getitem:
                return self.argument(node.args[0])[node.args[1]]
            if node.target in VIEWS:
                return VIEWS[node.target](self, node)
            if node.target in ELEMENTWISE:
                return self.elementwise(node)
            if node.target in OPERATORS:
                return OPERATORS[node.target](self, node, chain)
        except CodegenError as error:
            raise CodegenError(f"{error}{self._place(node)}") from None
        raise CodegenError(
            f"codegen has no kernel for {node.target} yet{self._place(node)}; "
            "run `specqd explain` to see every operator that cannot be compiled"
        )

    def elementwise(self, node: fx.Node) -> Value:
        """Combine the operands of an elementwise node into an expression."""
        operands = [self.argument(a) for a in node.args]
        value = node.meta["val"]
        options = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
        return combine(ELEMENTWISE[node.target], operands, options, tuple(value.shape), _DTYPES[value.dtype])

    def argument(self, a: Any) -> Any:
        """Resolve an argument: a value for a node, recursively for lists, itself otherwise."""
        if isinstance(a, fx.Node):
            if a.op == "get_attr":
                return self.small_weight(a)
            return self.env[a]
        if isinstance(a, list | tuple):
            return [self.argument(x) for x in a]
        return a

    def sources(self, node: fx.Node) -> tuple[str, ...]:
        """Names of the weights a get_attr node stands for, one a layer inside a layer loop."""
        stacked = self.stacks.get(node, (node,)) if self.step.iteration is not None else (node,)
        return tuple(str(n.target) for n in stacked)

    def small_weight(self, node: fx.Node) -> Value:
        """Read a weight as a float32 (or int32) tensor, element by element."""
        stored = self.program.weights[str(node.target)]
        form, dtype = ("flat", "float32") if stored.is_floating_point() else ("ints", "int32")
        if stored.numel() == 1 and self.step.iteration is None:
            return constant(stored.item(), dtype, stored.shape)
        buffer, offset = self.step.weight(Packed(self.sources(node), form, dtype, stored.numel()))
        return of_buffer(self.space, buffer, tuple(stored.shape), dtype, offset)

    def _place(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack")
        place = f", in {next(reversed(stack.values()))[0]}" if stack else ""
        return f" (node {node.name}{place})"

    def _finish(self) -> None:
        value, logits = self.env[self.output], self.into[self.output]
        rows, vocab = value.size // value.shape[-1], value.shape[-1]
        chosen = self.step.parameter("next", "next", "int32", (rows,))
        sums = self.step.parameter("sums", "sums", "float32", (rows * 2,))
        kinds = (("float32", 16), ("int32", 16), ("float32", 32))
        best, where, parts = (self.step.scratch(rows * size, dtype) for dtype, size in kinds)
        argmax(self.isa, rows, vocab, logits, chosen, sums, (best, where, parts), self.step.phase)


def _spacing(places: tuple[int, ...], iteration: Any) -> tuple[Any, int]:
    """Return the first cache layer and the step to the next, the first moved on where a step is another."""
    first, step = places[0], places[1] - places[0]
    for i, (before, place) in enumerate(pairwise(places), 1):
        if place - before != step:
            first = first + tirx.Select(iteration >= i, i32(place - before - step), i32(0))
    return first, step


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def _readers(node: fx.Node) -> set[fx.Node]:
    """Nodes that read a value, looking through views."""
    readers: set[fx.Node] = set()
    for user in node.users:
        readers |= _readers(user) if user.target in VIEWS else {user}
    return readers

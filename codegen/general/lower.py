"""Lower: a decomposed graph becomes a Relax function, operator by operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from tvm import relax

from specqd.codegen.dense_kernels import Requantise
from specqd.codegen.general.codes import TAKES_BF16, move_codes
from specqd.codegen.general.decompose import Decomposed, decompose
from specqd.codegen.general.ending import ending
from specqd.codegen.general.factors import factors
from specqd.codegen.general.lowering import CHEAP, End, Lowering, Schedules
from specqd.codegen.general.operators.pointwise import dtype_of
from specqd.codegen.general.rows import rows_as_images
from specqd.codegen.general.sizes import Sizes
from specqd.codegen.general.table import RULES
from specqd.codegen.general.values import Value, i64
from specqd.codegen.isa import ISA
from specqd.errors import CodegenError
from specqd.manifest import KernelCall
from specqd.program import Entry, Program

__all__ = ["Lowered", "lower"]

_BF16 = "bfloat16 is not compiled yet; convert the module to float32, and use cast-bf16"
#: operations an element beyond which an expression is computed into a tensor
LONG = 60
#: elements of a constant that may be computed when the artifact is built, beyond what its inputs have
FOLDED = 1 << 16


@dataclass(frozen=True)
class Lowered:
    """A Relax module whose function `main` takes the inputs, then the parameters, and gives the outputs.

    Attributes:
        module: the Relax IRModule.
        inputs: dtype and shape of each input, then of each state; dynamic sizes are the names of symbols.
        outputs: likewise, states at the end; sizes that are computed are None.
        ranges: the least and the largest value of each symbol; None for no limit.
        parameters: what makes the arrays of the parameters, by name, in their order.
        calls: the calls of kernels, in order.
    """

    module: Any
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    outputs: tuple[tuple[str, tuple[int | None, ...]], ...]
    ranges: Mapping[str, tuple[int, int | None]]
    parameters: Mapping[str, tuple[Value, Callable[[], Any]]]
    calls: tuple[KernelCall, ...]


def lower(program: Program, entry: Entry, isa: ISA, schedules: Schedules = lambda spec: None) -> Lowered:
    """Lower an entry of a module for an instruction set; `schedules` chooses how its kernels are cut.

    Raises:
        CodegenError: names every operator that cannot be lowered, with its place in the model and why.
    """
    decomposed = decompose(program, entry, RULES)
    rows_as_images(decomposed.graph)
    move_codes(decomposed.graph)
    return _Walk(program, entry, decomposed, isa, schedules).lower()


class _Walk:
    """The walk over one graph."""

    def __init__(
        self, program: Program, entry: Entry, decomposed: Decomposed, isa: ISA, schedules: Schedules
    ) -> None:
        self.program, self.decomposed = program, decomposed
        self.names = [declared.name for declared in program.takes(entry)]
        self.sizes = Sizes()
        self.builder = relax.BlockBuilder()
        self.lowering = Lowering(isa, self.sizes, self.builder, schedules)
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[fx.Node, torch.Tensor] = {}
        self.refused: dict[str, str] = {}
        self.ranges: dict[str, tuple[int, int | None]] = {}
        self.taken: dict[fx.Node, fx.Node] = {}
        self.lowering.endings = self._end
        self.lowering.factors = partial(factors, self.values)

    def lower(self) -> Lowered:
        """Walk from the inputs to the outputs."""
        for node in self.decomposed.inputs:
            self._declare(node)
        inputs = tuple(map(self._input, self.decomposed.inputs, self.names))
        for node, name in self.decomposed.weights.items():
            self.known[node] = self.program.weights[name]
            if self.known[node].dtype is not torch.bfloat16:
                dtype_of(self.known[node].dtype)
            self.values[node] = self.lowering.constant(name, self.known[node])
        for node, tensor in self.decomposed.constants.items():
            self.known[node] = tensor
            self.values[node] = self.lowering.constant(f"constant {node.name}", tensor)
        given = [self.values[node].tensor.var for node in self.decomposed.inputs]
        results: list[Value] = []
        with self.builder.function("main"):
            with self.builder.dataflow():
                for node in self.decomposed.graph.nodes:
                    if node.op == "call_function":
                        self._lower(node)
                if not self.refused:
                    results = self._results()
                outputs = [self.builder.emit_output(value.tensor.var) for value in results if value.tensor]
            parameters = self.lowering.parameters
            variables = [*given, *(value.tensor.var for value, _ in parameters.values() if value.tensor)]
            self.builder.emit_func_output(relax.Tuple(outputs), variables)
        if self.refused:
            raise CodegenError(*self.refused.values())
        described = tuple(map(self._described, results))
        calls = tuple(self.lowering.calls)
        return Lowered(self.builder.get(), inputs, described, self.ranges, parameters, calls)

    # -- inputs and outputs -------------------------------------------------------------------------------------

    def _declare(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise CodegenError(f"the input {node.name} is no tensor")
        for size in value.shape:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                self.sizes.declare(size.node.expr, int(size.node.hint))
                self.ranges[str(size.node.expr)] = _range(size)

    def _input(self, node: fx.Node, name: str) -> tuple[str, str, tuple[int | str, ...]]:
        value = node.meta["val"]
        shape = tuple(self.sizes(size) for size in value.shape)
        dtype = dtype_of(value.dtype)
        var = relax.Var(f"input_{name}", relax.TensorType(list(map(i64, shape)), dtype))
        self.values[node] = self.lowering.tensor(var, shape, dtype, given=True)
        symbols = [s if isinstance(s, int) else str(s.node.expr) for s in value.shape]
        return name, dtype, tuple(symbols)

    def _results(self) -> list[Value]:
        (output,) = self.decomposed.graph.find_nodes(op="output")
        try:
            return [self._result(value) for value in self._outputs(output)]
        except Exception as error:
            self._refuse(output, _message(error))
            return []

    def _outputs(self, output: fx.Node) -> list[Value]:
        found = output.args[0]
        found = list(found) if isinstance(found, list | tuple) else [found]
        if any(not isinstance(node, fx.Node) for node in found):
            raise CodegenError("an output of the module is no tensor; return tensors only")
        return [self.values[node] for node in found]

    def _result(self, value: Value) -> Value:
        if value.dtype == "bfloat16":
            raise CodegenError(_BF16)
        settled = self.lowering.settle(value)
        foreign = settled.tensor is not None and settled.tensor.given
        return self.lowering.settle(settled, copy=True) if foreign else settled

    def _described(self, value: Value) -> tuple[str, tuple[int | None, ...]]:
        return value.dtype, tuple(size if isinstance(size, int) else None for size in value.shape)

    # -- one operator -------------------------------------------------------------------------------------------

    def _lower(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, at = node.args
            if source in self.values:
                self.values[node] = self._kept(node, self.values[source][at])
            return
        if node in self.taken:
            self.values[node] = self.values[self.taken[node]]
            return
        if "val" in node.meta and isinstance(node.meta["val"], torch.SymInt | torch.SymFloat | torch.SymBool):
            return  # sizes are read from what the operators say of theirs
        if any(self._lacks(source) for source in node.all_input_nodes) or self._folded(node):
            return
        rule = RULES.get(node.target, _refuse)
        if node.target not in TAKES_BF16 and any(map(_is_bf16, node.all_input_nodes)):
            rule = _refuse_bf16
        self.lowering.node = node
        try:
            args, kwargs = (map_arg(a, self._argument) for a in (node.args, node.kwargs))
            found = rule(self.lowering, node, *args, **kwargs)
        except Exception as error:
            self._refuse(node, _message(error))
        else:
            self.values[node] = self._kept(node, found)

    def _end(self, node: fx.Node, through_views: bool, dtype: str) -> End:
        found = ending(node, self.values.__contains__, through_views=through_views, dtype=dtype)
        self.taken |= found.taken
        residual, rounded = found.residual, found.rounded
        if rounded is None:
            return End(None if residual is None else self.values[residual], found.activation)
        kind = str(rounded.meta["val"].dtype).removeprefix("torch.")
        codes = None if residual is None else self.values[residual.args[0]]
        summand = None if residual is None else Requantise(*residual.args[1:3])
        return End(codes, found.activation, kind, Requantise(*rounded.args[1:3]), summand)

    def _lacks(self, node: fx.Node) -> bool:
        return node not in self.values and isinstance(node.meta.get("val"), torch.Tensor | tuple | list)

    def _argument(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        return self._number(node.meta["val"])

    def _number(self, value: Any) -> Any:
        return self.sizes.scalar(value) if isinstance(value, torch.SymFloat) else self.sizes(value)

    def _kept(self, node: fx.Node, value: Any) -> Any:
        """Compute into a tensor what several operators read, or what has become long."""
        if not isinstance(value, Value):
            return value
        readers = sum(list(user.all_input_nodes).count(node) + _repeats(user, node) for user in node.users)
        if value.cost > LONG or (value.cost > CHEAP and readers > 1):
            return self.lowering.ready(value)
        return value

    def _folded(self, node: fx.Node) -> bool:
        """Compute now what depends on weights alone and is no larger than they are."""
        sources = node.all_input_nodes
        result = node.meta.get("val")
        if not sources or not isinstance(result, torch.Tensor) or any(s not in self.known for s in sources):
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
        if result.numel() > FOLDED + sum(self.known[s].numel() for s in sources):
            return False
        args, kwargs = (map_arg(a, self.known.__getitem__) for a in (node.args, node.kwargs))
        with torch.no_grad():
            self.known[node] = node.target(*args, **kwargs)
        self.values[node] = self.lowering.constant(f"folded {node.name}", self.known[node])
        return True

    def _refuse(self, node: fx.Node, why: str) -> None:
        lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
        lines = [line for line in lines if line.strip("^~ ")]
        where = f" at {': '.join(lines[-2:])}" if lines else ""
        self.refused.setdefault(f"{node.target} {why}", f"{node.name} = {node.target}{where}: {why}")


def _range(size: torch.SymInt) -> tuple[int, int | None]:
    """The range in which a size may be; torch assumes 2 or more of any, and is right for less."""
    known = size.node.shape_env.var_to_range[size.node.expr]
    least, most = int(known.lower), known.upper
    return (least if least > 2 else 0), (int(most) if most.is_Integer and int(most) < 2**31 else None)


def _message(error: Exception) -> str:
    """What a user gets to know of it; errors of TVM, which come with a stack, are told by their last line."""
    if isinstance(error, CodegenError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {lines[-1]}"


def _repeats(user: fx.Node, node: fx.Node) -> int:
    found = 0

    def count(arg: fx.Node) -> fx.Node:
        nonlocal found
        found += arg is node
        return arg

    map_arg((user.args, user.kwargs), count)
    return found - 1


def _is_bf16(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dtype is torch.bfloat16


def _refuse_bf16(lowering: Lowering, node: fx.Node, *_: Any, **__: Any) -> Any:
    """The rule of an operator that would compute with BF16, which TVM's own rules do with crashes."""
    raise CodegenError(_BF16)


def _refuse(lowering: Lowering, node: fx.Node, *_: Any, **__: Any) -> Any:
    """The rule of an operator that has none."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        raise CodegenError("it draws random numbers, which cannot be compiled")
    if node.target is torch.ops.aten.copy_.default:
        raise CodegenError(
            "it writes into an input, a weight or a view; give what it writes as an output instead"
        )
    if isinstance(node.meta.get("val"), torch.Tensor):
        dtype_of(node.meta["val"].dtype)  # a dtype that is not compiled says more than its operator
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        raise CodegenError("what it gives has a shape, or is a number, that is only known once the data is")
    raise CodegenError("there is no rule for this operator")

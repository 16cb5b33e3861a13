"""Run an entry in eager torch: the slow oracle that compiled code is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

import specqd.ops  # noqa: F401  (registers the operators graphs hold)
from specqd.cache_formats import FORMATS, tensor_dtype
from specqd.errors import CaptureError, InputError
from specqd.program import Entry, Program

__all__ = [
    "Interpreter", "OpenSizes", "captured_inputs", "demand_fitting", "example_values", "fake_values", "inputs",
    "module", "new_caches", "propagate", "run", "weight_seen",
]  # fmt: skip


class Interpreter(fx.Interpreter):
    """Runs an entry's graph on tensors given as `inputs` orders them.

    Weights of a language model act as float32, whatever float dtype they have; those of other modules as what they are.
    """

    def __init__(self, program: Program, entry: Entry) -> None:
        super().__init__(torch.nn.Module(), graph=entry.graph)
        self.weights, self.entry = program.weights, entry

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Give the weight as the graph sees it."""
        return weight_seen(self.entry, self.weights[target])


class OpenSizes(fx.Interpreter):
    """Runs a graph without asking of sizes, which may be symbols of `sizes`, what their operators need not know."""

    sizes: Any = None  # a ShapeEnv

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator."""
        # Called as an operator it would give a plain number, and so fix the size.
        if target is torch.ops.aten.sym_size.int:
            return args[0].shape[args[1]]
        # How a convolution's result would lie in memory depends on sizes; what it holds does not, beyond what its
        # capture has asked of them.
        convolves = "conv" in str(target)
        with self.sizes.suppress_guards() if convolves and self.sizes else nullcontext():
            return super().call_function(target, args, kwargs)


class _ShapeInterpreter(OpenSizes, Interpreter):
    """Runs a graph on fake tensors of a mode; `env` has each node's value then."""

    def __init__(self, program: Program, entry: Entry, mode: Any) -> None:
        super().__init__(program, entry)
        self.sizes = mode.shape_env
        self.mode, self.garbage_collect_values = mode, False

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; raises CaptureError where its shape cannot be told without data."""
        try:
            return super().run_node(n)
        except Exception as error:
            from specqd.frontends.normalise import place

            lines = str(error).splitlines() or ["no message"]
            raise CaptureError(
                f"the shape of {n.format_node()} cannot be told without data: {place(n)}: "
                f"{type(error).__name__}: {lines[0]}"
            ) from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Give a fake tensor of the weight's shape."""
        weight = self.weights[target]
        as_float32 = self.entry.of_language_model and weight.is_floating_point()
        with self.mode:
            return torch.empty(weight.shape, dtype=torch.float32 if as_float32 else weight.dtype)


def weight_seen(entry: Entry, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as an entry's graph sees it: float32 if it is a language model's, of whatever float dtype."""
    return weight.float() if entry.of_language_model and weight.is_floating_point() else weight


def new_caches(program: Program) -> dict[str, torch.Tensor]:
    """Make zeroed tensors for every placeholder that caches and states declare, and for what an observer says.

    A quantised cache is a float32 one of what reading it gives: specqd::cached_attention rounds what it writes. One
    that is rounded by whole blocks is kept in BF16, and rounded when it is read.
    """
    caches = {}
    for c in program.caches.values():
        parts = (("k", c.key_dim, c.key_dtype), ("v", c.value_dim, c.value_dtype))
        for part, channels, dtype in parts:
            shape = c.layers, c.kv_heads, c.capacity, channels
            kept = torch.bfloat16 if c.whole_blocks and FORMATS[dtype].rounded else tensor_dtype(dtype)
            caches[f"{c.name}_{part}"] = torch.zeros(shape, dtype=kept)
        if program.selection:
            caches[f"{c.name}_received"] = torch.zeros(c.layers, c.kv_heads, c.capacity)
    for state in program.states.values():
        caches[state.name] = torch.zeros(state.shape, dtype=getattr(torch, state.dtype))
    return caches


def inputs(entry: Entry, tokens: Any, positions: Any, caches: dict[str, Any]) -> list[Any]:
    """Put what an entry takes into the order of its placeholders."""
    given = {"tokens": tokens, "positions": positions, **caches}
    return [given[str(n.target)] for n in entry.graph.nodes if n.op == "placeholder"]


def run(program: Program, entry: Entry, *given: Any, caches: dict[str, torch.Tensor] | None = None) -> Any:
    """Return what an entry computes.

    Of a language model: float32 logits `[1, S, vocab]` for `tokens` int64 `[1, S]`, then optionally `positions` (0..S-1
    by default) and `caches` by name (by default fresh ones), which are updated in place. Of any other module: its
    output, or a tuple of several, for tensors in the order of `entry.inputs`; `caches` are its states then.

    Raises:
        InputError: a tensor is not what the module's input takes.
    """
    if entry.of_language_model:
        named: dict[str, Any] = {} if caches is None else {"caches": caches}
        given = tuple(_for_language_model(program, entry, *given, **named))
        with torch.no_grad():
            return Interpreter(program, entry).run(*given)
    demand_fitting(entry, given)
    states = [new.name for new in program.takes(entry)[len(given) :]]
    kept = new_caches(program) if caches is None else caches
    with torch.no_grad():
        found = Interpreter(program, entry).run(*given, *(kept[name] for name in states))
        return _without_states(found, [kept[name] for name in states])


def _without_states(found: Any, states: Sequence[torch.Tensor]) -> Any:
    """Move the last outputs into the states, and return what is left: one output, or a tuple."""
    if not states:
        return found
    own, new = found[: -len(states)], found[-len(states) :]
    for state, value in zip(states, new, strict=True):
        state.copy_(value)
    return own[0] if len(own) == 1 else own


def _for_language_model(
    program: Program,
    entry: Entry,
    tokens: torch.Tensor,
    positions: torch.Tensor | None = None,
    caches: dict[str, torch.Tensor] | None = None,
) -> list[Any]:
    if positions is None:
        positions = torch.arange(tokens.shape[1])[None]
    return inputs(entry, tokens, positions, new_caches(program) if caches is None else caches)


def demand_fitting(entry: Entry, given: Sequence[Any]) -> None:
    """Raise InputError unless tensors are what the inputs of a module's entry take, one for each."""
    if len(given) != len(entry.inputs):
        takes = ", ".join(map(str, entry.inputs))
        raise InputError(f"{entry.name} was given {len(given)} inputs and takes {len(entry.inputs)}: {takes}")
    for wanted, tensor in zip(entry.inputs, given, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{entry.name} takes {wanted}; give a tensor, not {type(tensor).__name__}")
        sizes = zip(tensor.shape, wanted.shape, strict=False)
        fits = all(got == size for at, (got, size) in enumerate(sizes) if at not in wanted.dynamic)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not fits or tensor.dim() != len(wanted.shape) or dtype != wanted.dtype:
            raise InputError(f"{entry.name} takes {wanted}, not {dtype} {list(tensor.shape)}")


def propagate(program: Program, entry: Entry, rows: int) -> None:
    """Set `node.meta["val"]` of every node to what `example_values` says."""
    for node, value in example_values(program, entry, rows).items():
        node.meta["val"] = value


def example_values(program: Program, entry: Entry, rows: int) -> dict[fx.Node, Any]:
    """Return a fake tensor (or int) of each node's shape, for `rows` tokens, or as a module's inputs had them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())  # which makes up a symbol for a size that depends on the data
    with mode, torch.no_grad():
        if entry.of_language_model:
            tokens = torch.zeros(1, rows, dtype=torch.int64)
            given = inputs(entry, tokens, tokens.clone(), new_caches(program))
        else:
            given = [torch.zeros(i.shape, dtype=getattr(torch, i.dtype)) for i in program.takes(entry)]
    return fake_values(program, entry, mode, given)


def captured_inputs(program: Program, entry: Entry) -> tuple[Any, list[Any]]:
    """Return a fake mode, and a tensor of it for each placeholder of a module's entry.

    Sizes that are open are symbols, with the ranges that the capture knows of them, where the placeholders still have
    what it gave them.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    values = [node.meta.get("val") for node in entry.graph.find_nodes(op="placeholder")]
    known = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    mode = next(known, None) or FakeTensorMode(shape_env=ShapeEnv())
    for at, (value, wanted) in enumerate(zip(values, program.takes(entry), strict=True)):
        if not isinstance(value, FakeTensor | torch.SymInt):
            with mode:
                values[at] = torch.empty(wanted.shape, dtype=getattr(torch, wanted.dtype))
    return mode, values


def fake_values(program: Program, entry: Entry, mode: Any, given: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return what each node computes of fake tensors of a mode, in the order of the entry's placeholders."""
    interpreter = _ShapeInterpreter(program, entry, mode)
    # Torch's rules in Python for composite operators ask less of data and of open sizes than those in C++.
    with mode, enable_python_dispatcher(), torch.no_grad():
        interpreter.run(*given)
    return interpreter.env


def module(program: Program, entry: Entry) -> torch.nn.Module:
    """Return an ordinary module, in evaluation mode, that computes an entry from its placeholders in eager torch.

    Its parameters, which need no gradients, are the entry's weights under their own names, so a state dict of the
    captured module fits. A name below that of another weight (`w.mxfp4_blocks`) ends in `_mxfp4_blocks` instead.
    """
    graph, holder = entry.copy().graph, torch.nn.Module()
    names = set(program.used_weights(entry.name))
    for name in names:
        path, _, last = name.rpartition(".")
        if path in names:
            path, _, last = f"{path}_{last}".rpartition(".")
        _hold(holder, path, last, weight_seen(entry, program.weights[name]).detach())
        for node in graph.find_nodes(op="get_attr"):
            node.target = f"{path}.{last}".lstrip(".") if node.target == name else node.target
    return fx.GraphModule(holder, graph, class_name=program.model.family).eval()


def _hold(module: torch.nn.Module, path: str, name: str, tensor: torch.Tensor) -> None:
    for part in filter(None, path.split(".")):
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if tensor.is_floating_point():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)

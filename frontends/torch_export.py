"""Any torch module becomes a Program of one entry, through torch.export, in the module's own dtypes."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from specqd.errors import CaptureError, InputError
from specqd.program import Entry, Input, ModelInfo, Program

from .composites import restore_batch_norms
from .normalise import normalise

__all__ = ["capture_module"]

aten = torch.ops.aten


def capture_module(module: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> Program:
    """Return a Program whose entry `target` computes what the module computes in evaluation mode.

    1. The placeholders are the tensors among the inputs, in their order; anything else keeps the value it has in
       `example_inputs`. The outputs are those of the module, flat, in a tuple if there are several.
    2. Weights are its parameters and buffers under their own names, each memory held once, and share that memory.
    3. Operators are not decomposed; those that change a tensor in place give a new one.
    4. The module is as before, its training flags included.

    Args:
        module: on the CPU.
        example_inputs: what to call it with; tensors, or containers of tensors and plain values.
        dynamic_shapes: which sizes may differ from the examples', as torch.export.export takes it.

    Raises:
        InputError: the example inputs are no tuple, or without a tensor.
        CaptureError: the module cannot be one graph, or changes a buffer or an input; names the construct.
    """
    if not isinstance(example_inputs, tuple):
        kind = type(example_inputs).__name__
        raise InputError(
            f"example_inputs is a {kind}; give a tuple of the module's inputs, such as (images,)"
        )
    away = next(
        (f"{n} is on {p.device}" for n, p in module.named_parameters() if p.device.type != "cpu"), None
    )
    if away:
        raise CaptureError(f"the weight {away}; move the module to the CPU first")
    exported = _export(module, example_inputs, dynamic_shapes)
    names, stored = _names(module)
    stored |= {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    lifted = {
        spec.arg.name: names.get(spec.target, spec.target)
        for spec in exported.graph_signature.input_specs
        if spec.target is not None and spec.kind is not InputKind.CUSTOM_OBJ
    }
    graph = normalise(exported.graph_module, lifted, {})
    inputs = tuple(filter(None, map(_input, graph.find_nodes(op="placeholder"))))
    if example_inputs and not inputs:
        raise InputError(f"{type(module).__name__} reads no tensor of its example inputs; give it one")
    for node in graph.find_nodes(op="placeholder"):
        if _input(node) is None and node.users:
            raise CaptureError(
                f"{node.name} is no tensor, yet its value is left open; leave it out of dynamic_shapes"
            )
        if _input(node) is None:
            graph.erase_node(node)
    restore_batch_norms(graph)
    used = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr")
    info = ModelInfo(type(module).__name__, 0, 0, source=type(module).__name__)
    weights = {name: stored[name].detach() for name in used}
    return Program({"target": Entry("target", graph, inputs=inputs)}, weights, info)


def _export(module: nn.Module, example: tuple[Any, ...], dynamic: Any) -> ExportedProgram:
    kind = type(module).__name__
    try:
        with torch.no_grad(), _evaluating(module):
            exported = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
            operators = (n.target for n in exported.graph.nodes if isinstance(n.target, OpOverload))
            if any(op._schema.is_mutable for op in operators):
                exported = exported.run_decompositions({})  # an empty table only makes operators functional
    except CaptureError:
        raise  # of a module that says itself why
    except Exception as error:
        raise CaptureError(f"{kind} cannot be turned into one graph: {_reason(error, module)}") from error
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise CaptureError(
            f"{kind} changes {changed[0]} when it runs, which cannot be compiled; give that as an output instead"
        )
    return exported


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, flag in training.items():
            part.training = flag


def _reason(error: Exception, module: nn.Module) -> str:
    """Say what failed, and at which line of which module."""
    names = {id(part): name for name, part in module.named_modules()}
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if id(owner := frame.f_locals.get("self")) in names:
            path, kind = names[id(owner)] or "the module", type(owner).__name__
            where = f" in {path} ({kind}), line {line} of {frame.f_code.co_filename.rpartition('/')[2]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}{where}: {lines[0]}"


def _names(module: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Map each parameter and buffer name to the first name of the same memory, and those names to tensors."""
    names: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for listed in (module.named_parameters, module.named_buffers):
        for name, tensor in listed(remove_duplicate=False):
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            names[name] = seen.setdefault(key, name) if tensor.numel() else name
            stored.setdefault(names[name], tensor)
    return names, stored


def _input(node: fx.Node) -> Input | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes = [(int(s.node.hint), True) if isinstance(s, torch.SymInt) else (s, False) for s in value.shape]
    dynamic = tuple(at for at, (_, symbolic) in enumerate(sizes) if symbolic)
    dtype = str(value.dtype).removeprefix("torch.")
    return Input(str(node.target), dtype, tuple(size for size, _ in sizes), dynamic)

"""Any torch module becomes a Program of one entry, through torch.export, in the module's own dtypes."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from specqd.errors import CaptureError, InputError
from specqd.program import Program

from .exported import demand_pure, functional, names_and_tensors, program_of
from .unchecked import Unchecked

__all__ = ["capture_module"]

#: what torch.export says of every recurrent layer, whose parameters lie in a list besides; it puts that list back
_LISTED = r"The tensor attributes? (self\.\S*_flat_weights\[\d+\](, )?)+ (was|were) assigned during export"


def capture_module(module: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> Program:
    """Return a Program whose entry `target` computes what the module computes in evaluation mode.

    1. The placeholders are the tensors among the inputs, in their order; anything else keeps the value it has in
       `example_inputs`. The outputs are those of the module, flat, in a tuple if there are several.
    2. Weights are its parameters and buffers under their own names, each memory held once, and share that memory.
    3. Operators are not decomposed; those that change a tensor in place give a new one.
    4. The functions of UNCHECKED take values that torch refuses.
    5. The module is as before, its training flags included.

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
    names, stored = names_and_tensors(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    program = program_of(exported, names, stored, type(module).__name__)
    if example_inputs and not program.target.inputs:
        raise InputError(f"{type(module).__name__} reads no tensor of its example inputs; give it one")
    return program


def _export(module: nn.Module, example: tuple[Any, ...], dynamic: Any) -> ExportedProgram:
    kind = type(module).__name__
    try:
        with torch.no_grad(), _evaluating(module), Unchecked(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", _LISTED, UserWarning)
            warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)  # torch warns itself
            exported = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
            exported = functional(exported)
    except CaptureError:
        raise  # of a module that says itself why
    except Exception as error:
        raise CaptureError(f"{kind} cannot be turned into one graph: {_reason(error, module)}") from error
    demand_pure(exported, kind)
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

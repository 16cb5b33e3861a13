"""An exported program of torch becomes a Program of one entry: what torch.export gave, or a `.pt2` file holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

import specqd.ops  # noqa: F401  (registers the operators that a file may name)
from specqd.errors import CaptureError, InputError
from specqd.program import Entry, Input, ModelInfo, Program
from specqd.saving import MODEL_INFO

from .composites import restore_batch_norms
from .normalise import normalise

__all__ = ["demand_pure", "functional", "names_and_tensors", "program_of", "read_exported"]


def read_exported(path: Path) -> Program:
    """Read what `torch.export.save` wrote, or `specqd rewrite`.

    Raises:
        InputError: there is no such file.
        CaptureError: it cannot be read, or holds what cannot be compiled.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    extra = {MODEL_INFO: ""}
    try:
        exported = functional(torch.export.load(path, extra_files=extra))
        model = _model(extra[MODEL_INFO])
    except Exception as error:  # torch raises whatever reading what it finds raised
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        raise CaptureError(
            f"{path} cannot be read as what torch.export.save writes: {type(error).__name__}: {lines[0]}"
        ) from error
    demand_pure(exported, path.name)
    names, stored = names_and_tensors(exported.state_dict.items())
    program = program_of(exported, names, stored, path.stem)
    program.model = model or program.model
    return program


def _model(text: str) -> ModelInfo | None:
    """Read what `specqd rewrite` says of a model; None of other files."""
    fields = json.loads(text or "{}").items()
    # JSON has no tuples.
    given: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in fields}
    return ModelInfo(**given) if given else None


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Let operators that change a tensor in place give a new one."""
    operators = (n.target for n in exported.graph.nodes if isinstance(n.target, OpOverload))
    if any(op._schema.is_mutable for op in operators):
        return exported.run_decompositions({})  # an empty table only makes operators functional
    return exported


def demand_pure(exported: ExportedProgram, kind: str) -> None:
    """Raise CaptureError if a program changes a buffer or an input."""
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise CaptureError(
            f"{kind} changes {changed[0]} when it runs, which cannot be compiled; give that as an output instead"
        )


def program_of(
    exported: ExportedProgram, names: Mapping[str, str], stored: dict[str, Tensor], family: str
) -> Program:
    """Return the Program of an exported program whose parameters and buffers are `stored` under their `names`.

    Raises CaptureError if it holds what cannot be compiled; names the construct.
    """
    stored = stored | {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    lifted = {
        spec.arg.name: names.get(spec.target, spec.target)
        for spec in exported.graph_signature.input_specs
        if spec.target is not None and spec.kind is not InputKind.CUSTOM_OBJ
    }
    graph = normalise(exported.graph_module, lifted, {})
    inputs = tuple(filter(None, map(_input, graph.find_nodes(op="placeholder"))))
    for node in graph.find_nodes(op="placeholder"):
        if _input(node) is None and node.users:
            raise CaptureError(
                f"{node.name} is no tensor, yet its value is left open; leave it out of dynamic_shapes"
            )
        if _input(node) is None:
            graph.erase_node(node)
    restore_batch_norms(graph)
    used = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr")
    weights = {name: stored[name].detach() for name in used}
    return Program(
        {"target": Entry("target", graph, inputs=inputs)}, weights, ModelInfo(family, 0, 0, source=family)
    )


def names_and_tensors(*listed: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Map each name of a parameter or a buffer to the first name of the same memory, and those names to tensors."""
    names: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for named in listed:
        for name, tensor in named:
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

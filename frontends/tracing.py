"""Trace a transformers decoder with torch.export as if its weights were float32, without making them so."""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from specqd.errors import CaptureError, SpecqdError

from .adapting import as_float32, attention_module, frozen_rope, through_the_interface
from .attention import CausalMask
from .independence import check_rows_independent
from .normalise import normalise, place

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

__all__ = ["trace"]

_EXAMPLE_LENGTH = 7


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        # A mask of ones says that nothing is padding; without it transformers looks for packed sequences.
        mask = torch.ones_like(tokens)
        out = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.logits


def trace(model: PreTrainedModel) -> tuple[fx.Graph, dict[str, Tensor], int, int]:
    """Return the graph, its weights by name, the vocabulary's size and how many positions it is right for."""
    names, stored = _names(model)
    with ExitStack() as stack:
        stack.enter_context(through_the_interface(model))
        limit = stack.enter_context(frozen_rope(model))
        stack.enter_context(as_float32(model))
        exported = _export(model, limit)
    lifted = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target is not None}
    lifted = {arg: names.get(short := target.removeprefix("model."), short) for arg, target in lifted.items()}
    stored |= {k.removeprefix("model."): v for k, v in exported.constants.items() if isinstance(v, Tensor)}
    numbers = (torch.float32, torch.int64)
    scalars = {n: t.item() for n, t in stored.items() if t.dim() == 0 and t.dtype in numbers}
    graph = normalise(exported.graph_module, lifted, scalars)
    if len(graph.output_node().all_input_nodes) != 1:
        raise CaptureError("the model gives several outputs where only its logits are expected")
    check_rows_independent(graph)
    _check_attention(graph, model)
    used = dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr")
    return graph, {name: stored[name] for name in used}, _vocabulary(graph), limit


def _names(model: PreTrainedModel) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Map each parameter and buffer name to the first name of the same memory, and those names to tensors."""
    names: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = (parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)
        names[name] = seen.setdefault(key, name) if parameter.numel() else name
        stored[names[name]] = parameter.detach()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        stored[name] = buffer.detach().float() if buffer.is_floating_point() else buffer.detach()
    return names, stored


def _export(model: PreTrainedModel, limit: int) -> ExportedProgram:
    length = max(2, min(_EXAMPLE_LENGTH, limit))
    rows = torch.export.Dim("S", max=max(limit, length))
    example = (torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None])
    try:
        with torch.no_grad():
            exported = torch.export.export(
                _Logits(model).eval(), example, dynamic_shapes=({1: rows}, {1: rows}), strict=False
            )
            operators = (n.target for n in exported.graph.nodes if isinstance(n.target, OpOverload))
            if any(op._schema.is_mutable for op in operators):
                exported = exported.run_decompositions({})  # an empty table only makes operators functional
    except SpecqdError:
        raise
    except Exception as error:
        kind = type(model).__name__
        raise CaptureError(f"{kind} cannot be turned into one graph: {_reason(error, model)}") from error
    if changed := list(exported.graph_signature.buffers_to_mutate.values()):
        raise CaptureError(f"{type(model).__name__} changes its buffer {changed[0]} when it runs")
    return exported


def _reason(error: Exception, model: PreTrainedModel) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if lines[0].startswith("Constraints violated"):
        return "its code depends on the number of tokens, as recurrences and chunked attention do"
    stack = traceback.extract_tb(error.__traceback__)
    frames = [f for f in stack if "transformers" in Path(f.filename).parts]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line}" if frames else ""
    if CausalMask.__name__ in lines[0]:
        return (
            f"{_failing_module(error, model)} reads the attention mask itself{where}; specqd compiles models that "
            "only hand it on to transformers' attention interface"
        )
    return f"{type(error).__name__}{where}: {lines[0]}"


def _failing_module(error: Exception, model: PreTrainedModel) -> str:
    """Name the innermost module of the model in whose code an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = next((m for m in reversed(owners) if id(m) in names), model)
    return f"{names[id(inner)] or 'the model'} ({type(inner).__name__})"


def _check_attention(graph: fx.Graph, model: PreTrainedModel) -> None:
    nodes = graph.find_nodes(op="call_function", target=torch.ops.specqd.causal_attention.default)
    layers = [node.args[4] for node in nodes]
    if not layers:
        raise CaptureError(f"{attention_module(model)} never calls transformers' attention interface")
    twice = next((node for node in nodes if layers.count(node.args[4]) > 1), None)
    if twice is not None:
        raise CaptureError(f"{place(twice)}: layer {twice.args[4]} attends twice; a layer has one cache only")


def _vocabulary(graph: fx.Graph) -> int:
    logits = graph.output_node().args[0].meta["val"]
    if logits.dtype != torch.float32 or logits.dim() != 3:
        raise CaptureError(
            f"the logits are {logits.dtype} {list(logits.shape)}; expected float32 [1, S, vocab]"
        )
    return int(logits.shape[-1])

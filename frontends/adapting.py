"""Make a transformers decoder ready to be traced, and put it back as it was afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from specqd.errors import CaptureError

from .attention import ATTENTION, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["as_float32", "attention_module", "frozen_rope", "through_the_interface"]

_UNBOUNDED = 2**31 - 1


@contextmanager
def through_the_interface(model: PreTrainedModel) -> Iterator[None]:
    """Send attention through `specqd`, experts through batched products; raises CaptureError if it cannot."""
    config = model.config
    if config.is_encoder_decoder:
        raise CaptureError(
            f"{type(model).__name__} is half of an encoder-decoder; specqd compiles decoders only"
        )
    attention, experts = config._attn_implementation, getattr(config, "_experts_implementation", None)
    register()
    model.set_attn_implementation(ATTENTION)
    try:
        if config.get_text_config()._attn_implementation != ATTENTION:
            raise CaptureError(
                f"{attention_module(model)} computes attention itself instead of through transformers' "
                f"attention interface, so the family {config.model_type!r} cannot be captured"
            )
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise CaptureError(f"{type(model).__name__} takes no position_ids, so no cache can continue it")
        if model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")
        yield
    finally:
        model.set_attn_implementation(attention)
        if experts is not None and model._can_set_experts_implementation():
            model.set_experts_implementation(experts)


def attention_module(model: nn.Module) -> str:
    """Name the first module of a model that computes attention, with its class."""
    kinds = ((name, type(module).__name__) for name, module in model.named_modules())
    name, kind = next(((n, k) for n, k in kinds if "attention" in k.lower()), ("", type(model).__name__))
    return f"{name} ({kind})" if name else kind


@contextmanager
def frozen_rope(model: PreTrainedModel) -> Iterator[int]:
    """Hold rotary frequencies that change with the length (longrope, dynamic) as they are for short ones.

    Gives the number of positions for which that is right.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or _UNBOUNDED
    changed: list[tuple[Any, Any]] = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = list(kind.values()) if isinstance(kind, dict) else [kind]
        if any(k == "longrope" or "dynamic" in str(k) for k in kinds):
            original = _numbers(getattr(config, "rope_parameters", None), "original_max_position_embeddings")
            limit = min([limit, *original])
            changed.append((module, kind))
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    try:
        yield int(limit)
    finally:
        for module, kind in changed:
            module.rope_type = kind


def _numbers(tree: Any, key: str) -> list[int]:
    if not isinstance(tree, dict):
        return []
    here = [tree[key]] if isinstance(tree.get(key), int) else []
    return here + [n for branch in tree.values() for n in _numbers(branch, key)]


@contextmanager
def as_float32(model: PreTrainedModel) -> Iterator[None]:
    """Put one float32 element, seen as the whole shape, in each parameter's place; make buffers float32."""
    stand_ins: dict[int, nn.Parameter] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    training, dtype = model.training, model.config.dtype
    try:
        model.eval()
        model.config.dtype = torch.float32
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                undo.append((module._parameters, name, parameter))
                shape = parameter.shape
                stand_in = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
                module._parameters[name] = stand_ins.setdefault(id(parameter), stand_in)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    undo.append((module._buffers, name, buffer))
                    module._buffers[name] = buffer.float()
        yield
    finally:
        for where, name, tensor in undo:
            where[name] = tensor
        model.config.dtype = dtype
        model.train(training)

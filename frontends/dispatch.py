"""The one way in: what is given decides which frontend takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from specqd.errors import InputError
from specqd.program import Program

__all__ = ["capture"]


def capture(
    source: str | Path | nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    dynamic_shapes: Any = None,
    *,
    tokenizer: str | Path | None = None,
) -> Program:
    """Return a Program of what `source` computes.

    1. A module with example inputs: see specqd.frontends.torch_export.capture_module.
    2. A `.pt2` file of torch.export: see specqd.frontends.exported.read_exported.
    3. Anything else is a language model: a folder, a hub id, a .gguf file or a transformers model, see
       specqd.frontends.huggingface.capture.

    Raises:
        InputError: example inputs that do not suit the source.
        CaptureError: as those say.
    """
    if example_inputs is None:
        if dynamic_shapes is not None:
            raise InputError("dynamic_shapes needs example_inputs, whose sizes it speaks of")
        if isinstance(source, str | Path) and Path(source).suffix == ".pt2":
            from .exported import read_exported

            return read_exported(Path(source))
        from .huggingface import capture as capture_language_model

        return capture_language_model(source, tokenizer=tokenizer)
    if not isinstance(source, nn.Module) or tokenizer is not None:
        raise InputError(
            "example_inputs belong to a torch module without a tokenizer; leave them out for a checkpoint"
        )
    from .torch_export import capture_module

    return capture_module(source, example_inputs, dynamic_shapes)

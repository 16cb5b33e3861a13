"""The one way in: what is given decides which frontend takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from specqd.errors import InputError
from specqd.program import Program

__all__ = ["capture"]


def capture(
    source: Any,
    example_inputs: tuple[Any, ...] | None = None,
    dynamic_shapes: Any = None,
    *,
    tokenizer: str | Path | None = None,
) -> Program:
    """Return a Program of what `source` computes.

    1. A path that ends in .onnx, or an onnx.ModelProto: see specqd.frontends.onnx.capture_onnx, whose `sizes` are
       `dynamic_shapes`; example inputs may be left out.
    2. A module with example inputs: see specqd.frontends.torch_export.capture_module.
    3. A `.pt2` file of torch.export: see specqd.frontends.exported.read_exported.
    4. Anything else is a language model: a folder, a hub id, a .gguf file or a transformers model, see
       specqd.frontends.huggingface.capture.

    Raises:
        InputError: example inputs that do not suit the source.
        CaptureError: as those say.
    """
    if _is_onnx(source):
        if tokenizer is not None:
            raise InputError("an ONNX model takes no tokenizer; leave it out")
        return _capture_onnx(source, example_inputs, dynamic_shapes)
    if example_inputs is None:
        if dynamic_shapes is not None:
            raise InputError(
                "sizes can be given for an .onnx file, and dynamic_shapes needs example_inputs; leave them out"
            )
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


def _is_onnx(source: Any) -> bool:
    """Whether it is an ONNX model, or the path of one; onnx need not be installed to tell."""
    if isinstance(source, str | Path):
        return str(source).endswith(".onnx")
    return type(source).__name__ == "ModelProto"


def _capture_onnx(source: Any, example_inputs: Any, sizes: Any) -> Program:
    if sizes is not None and not isinstance(sizes, Mapping):
        raise InputError("dynamic_shapes of an ONNX model gives numbers or Dims by the names of its sizes")
    if example_inputs is not None and not isinstance(example_inputs, tuple | list):
        raise InputError("example_inputs is a tuple of the model's inputs, such as (images,)")
    try:
        from .onnx import capture_onnx
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "google"):
            raise
        raise InputError("reading ONNX models takes the package onnx: pip install 'specqd[onnx]'") from error
    return capture_onnx(source, example_inputs, sizes)

"""A Program becomes an ONNX model, by torch's exporter and translations of specqd's own operators."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from specqd.errors import ContractError, InputError
from specqd.program import Entry, Program

from .compression import LOWERED, STANDARD, replace_weights
from .translations import TRANSLATIONS, demand_translatable

__all__ = ["export_onnx"]


def export_onnx(
    program: Program, path: str | Path, entry: str | None = None, *, lowered: bool = False
) -> Path:
    """Write an entry (default: the target) as an ONNX model, and return its path.

    1. Its operators are ONNX's own: attention is `Attention`, norms are `RMSNormalization`.
    2. MXFP4 matrices are FLOAT4E2M1 in blocks of 32 with FLOAT8E8M0 scales, read by `DequantizeLinear`: opset 24.
       INT8 ones have a scale for each row.
    3. With `lowered`, MXFP4 codes are bytes that are looked up in a table, and the opset is 23: for runtimes that do
       not know those types yet.
    4. Weights of more than a gigabyte lie in a file beside the model, `<path>.data`. Those of language models are
       float32, as the graph computes.

    Raises:
        InputError: the path is taken or cannot be written, there is no such entry, or onnxscript is not installed.
        ContractError: the entry holds what ONNX has no operators for, such as a cache; says what to do.
    """
    chosen = program.target if entry is None else program.entry(entry)
    target = Path(path)
    if target.exists() or not target.parent.is_dir():
        raise InputError(f"{target} exists, or its folder does not; give the path of a new file")
    demand_translatable(program, chosen)
    exported = _exported(program, chosen)
    with _quiet():
        converted = torch.onnx.export(
            exported, dynamo=True, opset_version=LOWERED if lowered else STANDARD, verbose=False,
            custom_translation_table=TRANSLATIONS,
        )  # fmt: skip
    if converted is None:
        raise ContractError(f"{chosen.name} could not be translated to ONNX")
    model = converted.model
    replace_weights(model, lowered=lowered)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # they name files of this machine
        if node.op_type == "Attention" and not any(output.uses() for output in node.outputs[1:]):
            node.resize_outputs(1)
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    ir.save(model, target, external_data=f"{target.name}.data" if large > 1 << 30 else None)
    return target


def _exported(program: Program, entry: Entry) -> torch.export.ExportedProgram:
    module = program.module(entry.name)
    symbols: dict[str, Any] = {}
    placeholders = {str(n.target): n for n in entry.graph.find_nodes(op="placeholder")}
    shapes: list[dict[int, Any]] = []
    for given in program.takes(entry):
        value = placeholders[given.name].meta.get("val")
        named = {}
        for axis in given.dynamic:
            # Sizes of one symbol stay one; those of a language model's inputs are its one sequence.
            symbol = str(value.shape[axis]) if isinstance(value, torch.Tensor) else "sequence"
            named[axis] = symbols.setdefault(symbol, Dim(f"size_{len(symbols)}", min=0))
        shapes.append(named)
    examples = tuple(torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for one in program.takes(entry))
    try:
        with torch.no_grad():
            return torch.export.export(module, examples, dynamic_shapes=tuple(shapes), strict=False)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        raise ContractError(f"{entry.name} cannot be exported: {type(error).__name__}: {lines[0]}") from error


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's notes on packages that are not there, and on its own future, from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

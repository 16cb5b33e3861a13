"""A Program as a file: what torch.export reads, and specqd.capture reads back."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from specqd.errors import ContractError, InputError
from specqd.program import Entry, Program

__all__ = ["MODEL_INFO", "save_exported"]

MODEL_INFO = "specqd.json"
"""What a saved Program says of its model lies under this name beside torch's own parts of the file."""


def save_exported(program: Program, path: str | Path, entry: str | None = None) -> None:
    """Write an entry (default: the target) as `torch.export.save` does; `specqd.capture(path)` reads it back.

    Weights are kept as the entry sees them, under their names. Other entries and the history are not written. The file
    appears when it is complete.

    Raises:
        InputError: the entry has a cache or a state, or the name does not end in `.pt2`.
        ContractError: a pass left behind what torch cannot export.
    """
    path, own = Path(path), program.target if entry is None else program.entry(entry)
    if path.suffix != ".pt2":
        raise InputError(f"cannot write {path}: give the file a name that ends in .pt2")
    placeholders = own.graph.find_nodes(op="placeholder")
    if len(placeholders) > len(own.inputs):
        raise InputError(
            f"{own.name} has a cache or a state, {placeholders[-1].name}, which belongs to an artifact: leave "
            "`insert-kv-cache` or `stream-frames` out"
        )
    examples = tuple(torch.zeros(i.shape, dtype=getattr(torch, i.dtype)) for i in own.inputs)
    try:
        exported = torch.export.export(
            program.module(own.name), examples, dynamic_shapes=_open_sizes(own), strict=False
        )
    except Exception as error:  # torch raises whatever running the graph on open sizes raised
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        raise ContractError(f"{own.name} cannot be exported: {type(error).__name__}: {lines[0]}") from error
    info = json.dumps(dataclasses.asdict(program.model))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        torch.export.save(exported, whole, extra_files={MODEL_INFO: info})
        os.replace(whole, path)


def _open_sizes(entry: Entry) -> tuple[dict[int, Any], ...]:
    """Return which sizes are open, with the ranges that are known of them."""
    found = []
    for node, declared in zip(entry.graph.find_nodes(op="placeholder"), entry.inputs, strict=True):
        value = node.meta.get("val")
        found.append({d: _range(None if value is None else value.shape[d]) for d in declared.dynamic})
    return tuple(found)


def _range(size: Any) -> Any:
    if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
        return Dim.AUTO
    known = size.node.shape_env.var_to_range[size.node.expr]
    most = int(known.upper) if known.upper.is_Integer and int(known.upper) < 2**31 else None
    return Dim.AUTO if most is None else Dim.AUTO(max=most)

"""Binding: a compiled function with the memory that its arguments lie in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from specqd.errors import ArtifactError, InputError
from specqd.manifest import Arg, Function, Manifest
from specqd.runtime.blocks import BlockTables
from specqd.runtime.library import aligned, tensor
from specqd.runtime.output import Output

__all__ = ["Bound", "Memory", "bind"]

_LARGEST = 2**31  # elements of a cache, which compiled code counts in 31 bits


@dataclass(frozen=True)
class Bound:
    """A function with its argument list; only the contents of its inputs change between calls."""

    call: Callable[..., None]
    args: tuple[Any, ...]
    tokens: np.ndarray
    positions: np.ndarray
    tables: np.ndarray
    output: Output
    received: np.ndarray | None = None


class Memory:
    """The arrays of an artifact: weights by name, and one zeroed buffer for each cache and scratch name.

    Raises:
        InputError: a cache of that many blocks is more than compiled code can reach.
    """

    def __init__(self, manifest: Manifest, weights: Mapping[str, np.ndarray], tables: BlockTables) -> None:
        self.vocab_size = manifest.vocab_size
        self._weights, self._tables = weights, tables
        self._tensors: dict[tuple[str, str, tuple[int, ...]], Any] = {}
        needed = {name: size * tables.pool for name, size in manifest.sizes("cache").items()}
        self._caches = {arg.name: arg for f in manifest.functions for arg in f.args if arg.kind == "cache"}
        for name, arg in self._caches.items():
            reached = _LARGEST * np.dtype(arg.dtype).itemsize
            if needed[name] >= reached:
                raise InputError(
                    f"the cache {name} would take {needed[name]} bytes and compiled code reaches {reached}: load with "
                    "fewer `sequences` or `cache_tokens`, or compile with a smaller `--context`"
                )
        needed.update({name: size * tables.sequences for name, size in manifest.sizes("recent").items()})
        needed.update(manifest.sizes("scratch"))
        self._buffers = {name: aligned(size) for name, size in needed.items()}
        self._planes = [
            self._buffers[name].reshape(arg.shape[0], tables.pool, -1) for name, arg in self._caches.items()
        ]

    def copy_block(self, source: int, block: int) -> None:
        """Copy what all caches hold in a block to another one."""
        for planes in self._planes:
            planes[:, block] = planes[:, source]

    def cache(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and the values of a cache as compiled code takes them."""
        keys, values = (self.array(self._caches[f"{name}_{part}"]) for part in "kv")
        return keys, values

    def array(self, arg: Arg) -> np.ndarray:
        """Return the array of an argument: its own, or the one shared by all that name it."""
        if arg.kind == "weight":
            found = self._weights.get(arg.name)
            if found is None or found.dtype != arg.dtype or found.nbytes != arg.nbytes:
                raise ArtifactError(
                    f"the weight file does not hold {arg.name!r} as compiled: compile it again"
                )
            return found.reshape(arg.shape)
        if arg.kind == "blocks":
            return self._tables.flat
        if arg.kind in {"cache", "recent"}:
            return self._buffers[arg.name].view(arg.dtype)
        memory = self._buffers[arg.name] if arg.kind == "scratch" else aligned(arg.nbytes)
        return memory[: arg.nbytes].view(arg.dtype).reshape(arg.shape)

    def tensor(self, arg: Arg, array: np.ndarray) -> Any:
        """Return what compiled code takes for an array, the same one for the same weight."""
        if arg.kind != "weight":
            return tensor(array)
        key = (arg.name, arg.dtype, arg.shape)
        if key not in self._tensors:
            self._tensors[key] = tensor(array)
        return self._tensors[key]


def bind(function: Function, call: Callable[..., None], memory: Memory) -> Bound:
    """Bind a compiled function to its memory; raises ArtifactError if an argument is missing or not as compiled."""
    arrays = {arg.name: memory.array(arg) for arg in function.args}
    by_kind = {arg.kind: arrays[arg.name] for arg in function.args}
    missing = {"tokens", "positions", "tables", "next"} - by_kind.keys()
    if missing:
        raise ArtifactError(f"function {function.symbol!r} takes no {missing.pop()}: compile it again")
    rows = len(by_kind["next"])
    logits, sums = by_kind.get("logits"), by_kind.get("sums")
    return Bound(
        call=call,
        args=tuple(memory.tensor(arg, arrays[arg.name]) for arg in function.args),
        tokens=by_kind["tokens"],
        positions=by_kind["positions"],
        tables=by_kind["tables"],
        received=by_kind.get("received"),
        output=Output(
            by_kind["next"],
            None if logits is None else logits.reshape(rows, -1),
            None if sums is None else sums.reshape(rows, 2),
            memory.vocab_size,
        ),
    )

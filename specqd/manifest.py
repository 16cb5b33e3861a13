"""The vocabulary of an artifact: what codegen hands over and what `specqd.json` says; no torch, no TVM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from specqd.tuning import TunedKernel

__all__ = [
    "BLOCK",
    "LONGEST_PASS",
    "OBSERVER",
    "SCHEMA_VERSION",
    "Arg",
    "CacheRecord",
    "Compiled",
    "FileRecord",
    "Function",
    "LevelRecord",
    "Manifest",
    "ModuleRecord",
    "Refused",
    "Selection",
    "TensorRecord",
    "recent_blocks",
]

SCHEMA_VERSION = 4

#: positions in a block of a cache
BLOCK = 16

#: rows of a pass, at most
LONGEST_PASS = 128

#: the entry that tells how much attention each slot of the target's cache gets: see passes/kv/select.py
OBSERVER = "observer"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Arg(_Record):
    """One positional argument of a compiled function: a contiguous CPU tensor.

    `kind` says who owns it: `tokens`, `positions` and `tables` (int32 `[rows]`: what is fed, where in its sequence
    it stands, and where the table of the sequence begins in `blocks`), `next` (int32, the greedy choices), `sums`
    (float32 `[rows, 2]`: how sure they are, see codegen/kernels/argmax.py) and `logits` (float32) are the caller's;
    so is `received` (float32 `[planes, capacity]`, the attention that each slot got) of an observer; a `cache` is
    state, shared by all functions that name it, of any number of blocks of 16 positions: it lies as `[planes, blocks,
    elements]` and its shape is that of one block, `[planes, elements]`; `recent` is state of which each sequence has
    its own, `[planes, sequences, elements]`, and its shape is that of one sequence; `blocks` (int32, of any size) are
    the tables that say which blocks hold a sequence (see Paged in codegen/kernels/cache.py); a `scratch` means nothing
    between calls; a `weight` lies in the weight file. `gathered`: only one row a token is read of it.
    """

    name: str
    kind: Literal[
        "tokens", "positions", "tables", "blocks", "next", "sums", "logits", "received", "cache", "recent",
        "scratch", "weight",
    ]  # fmt: skip
    dtype: str
    shape: tuple[int, ...]
    gathered: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Function(_Record):
    """A compiled function of `rows` rows, each any position of any sequence.

    `last_only`: they must be consecutive positions of one sequence, and it outputs the last only.
    """

    entry: str
    rows: int
    last_only: bool
    symbol: str
    args: tuple[Arg, ...]


class LevelRecord(_Record):
    """What one entry of the chain can hold and say.

    `capacity`: positions of its caches; `vocab_size`: tokens it takes and gives logits of.
    """

    capacity: int
    vocab_size: int


class CacheRecord(_Record):
    """A cache's planes, one for each layer and key head: they are the model's from `first_plane` on.

    The formats are names of specqd.cache_formats. `recent`: how many positions before the block that is written are
    read in BF16 too, if whole blocks are packed.
    """

    layers: int
    kv_heads: int
    first_plane: int
    key_dtype: str
    value_dtype: str
    recent: int | None = None

    @property
    def planes(self) -> int:
        """Key heads of all layers."""
        return self.layers * self.kv_heads


class TensorRecord(_Record):
    """A tensor that the function of a module takes or gives.

    A size is a number, the name of a dynamic size (the same wherever the name is the same), or None where it follows
    from the inputs. `dtype` is torch's name.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        """Give it as `x float32 [batch, 3, 224, 224]`."""
        return f"{self.name} {self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


class KernelCall(_Record):
    """One call of a kernel: the operator it was made for, the module of the model where that is, and its work.

    `flops` are those of a product's multiplications and additions, at the sizes of the example inputs; 0 for kernels
    that are no product.
    """

    function: str
    operator: str
    module: str
    flops: int


class ModuleRecord(_Record):
    """How to call the function of a module that is no language model.

    It takes `inputs`, then `states`, then the weights named in `parameters`, and gives `outputs`, then the next value
    of each state, which is zeros at first. `ranges` are the least and the largest value of dynamic sizes by name, None
    for no limit. `kernels` are its calls in order, if they were recorded; `tuned` those whose schedule was measured.
    """

    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    ranges: dict[str, tuple[int, int | None]]
    parameters: tuple[str, ...]
    states: tuple[TensorRecord, ...] = ()
    kernels: tuple[KernelCall, ...] = ()
    tuned: tuple[TunedKernel, ...] = ()


class Selection(_Record):
    """Which positions `entry` keeps in its cache, or attends to in the target's: see passes/kv/select.py.

    `method` and `options` are what `specqd.selection.method` takes.
    """

    entry: str
    method: str
    options: dict[str, str | int | float]
    tokens: int
    above: int
    every: int
    window: int
    sinks: int
    recent: int


class FileRecord(_Record):
    """Size in bytes and SHA-256 of one file of the artifact."""

    size: int
    sha256: str


class Refused(_Record):
    """A rewrite that a pass did not make, and why."""

    step: str
    entry: str
    node: str
    why: str


class Manifest(_Record):
    """What `specqd.json` holds; `digest` is the SHA-256 of its own text without it.

    `chain` names the entries that speculate, target first; `capacity` is the most positions that the caches
    hold; `levels` says more of each; `plan` is how to speculate unless the caller says otherwise (see
    specqd.runtime.plan), `planned_speedup` how many times faster than plainly `specqd tune` predicted it to be (None:
    it was not tuned); `max_positions` how long a text the model knows (0: of any length), which with a selection in the
    target may be more than the caches hold; `module` is set for a module that is no language model, which has neither
    caches nor a plan; `isa`, `triple` and `cpu_features` (LLVM's names) what the CPU must have.
    """

    schema_version: Literal[4] = 4
    specqd_version: str
    family: str
    source: str
    pipeline: str
    chain: tuple[str, ...]
    capacity: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    plan: str
    planned_speedup: float | None = None
    max_positions: int = 0
    caches: dict[str, CacheRecord] = Field(default_factory=dict)
    selection: Selection | None = None
    module: ModuleRecord | None = None
    isa: str
    triple: str
    cpu_features: tuple[str, ...]
    functions: tuple[Function, ...]
    levels: dict[str, LevelRecord] = Field(default_factory=dict)
    refusals: tuple[Refused, ...] = ()
    files: dict[str, FileRecord] = Field(default_factory=dict)
    digest: str = ""

    def level(self, entry: str) -> LevelRecord:
        """What is known of an entry; an artifact without the record has one capacity and vocabulary for all."""
        alike = LevelRecord(capacity=self.capacity, vocab_size=self.vocab_size)
        return self.levels.get(entry, alike)

    def sizes(self, kind: str, entry: str | None = None) -> dict[str, int]:
        """Bytes of each distinct buffer of one argument kind, over the functions of `entry` or of all."""
        found: dict[str, int] = {}
        for function in self.functions:
            if entry in {None, function.entry}:
                for arg in function.args:
                    if arg.kind == kind:
                        found[arg.name] = max(found.get(arg.name, 0), arg.nbytes)
        return found

    @property
    def planes(self) -> int:
        """Planes of all caches: a layer's key head each."""
        return sum(cache.planes for cache in self.caches.values())

    def cache_bytes(self, positions: int) -> int:
        """Bytes of all caches that hold so many positions, recent blocks aside."""
        return -(-positions // BLOCK) * sum(self.sizes("cache").values())

    @property
    def recent_bytes(self) -> int:
        """Bytes of all recent blocks of a sequence."""
        return sum(self.sizes("recent").values())

    @property
    def memory(self) -> int:
        """Bytes that running takes beyond the interpreter, estimated: weights once, full caches and scratch."""
        rest = sum(sum(self.sizes(kind).values()) for kind in ("weight", "scratch", "logits"))
        return rest + self.cache_bytes(self.capacity) + self.recent_bytes


def recent_blocks(recent: int) -> int:
    """Blocks of a sequence that are kept in BF16 beside packed ones.

    That is enough for the longest pass, wherever in a block it begins, and `recent` positions before that block.
    """
    return (recent + LONGEST_PASS) // BLOCK + 1


@dataclass(frozen=True)
class Compiled:
    """What codegen hands over, free of torch: code (bytes or a file), packed weights, how to call; what it refused."""

    library: bytes | Path
    weights: Mapping[str, np.ndarray]
    functions: tuple[Function, ...]
    isa: str
    cpu_features: tuple[str, ...]
    triple: str
    module: ModuleRecord | None = None
    refusals: tuple[Refused, ...] = ()

"""The engine: compiled functions bound once to weights, caches and buffers, then called step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specqd.artifact import Artifact, open_artifact
from specqd.errors import ArtifactError, InputError
from specqd.manifest import Arg, Function
from specqd.runtime.cpu import demand_cpu
from specqd.runtime.library import aligned, load_functions, set_threads, tensor
from specqd.runtime.threads import ThreadChoice, available_cpus
from specqd.weightfile import read_weights

__all__ = ["Engine"]


@dataclass(frozen=True)
class _Bound:
    """A function with its argument list; only the contents of tokens and start change between calls."""

    call: Callable[..., None]
    args: tuple[Any, ...]
    tokens: np.ndarray
    start: np.ndarray
    next: np.ndarray
    logits: np.ndarray | None
    last_only: bool


class Engine:
    """Runs the compiled functions of an artifact, one sequence at a time.

    `step` feeds consecutive positions to an entry; positions it feeds again are overwritten in the caches,
    and later ones are ignored. By default the thread count follows what is fastest at the time
    (`ThreadChoice`) up to `threads`, itself by default the CPUs this process may use.
    """

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"cannot run on {threads} threads: give 1 or more")
        manifest = artifact.manifest
        demand_cpu(manifest.triple, manifest.cpu_features)
        self.artifact = artifact
        self.manifest = manifest
        self.capacity = manifest.capacity
        self.threads = threads or available_cpus()
        self._choice = ThreadChoice(self.threads)
        self._threads_set = 0
        self.find = load_functions(artifact.library, self.threads)
        self._weights = read_weights(artifact.weights)
        self._tensors: dict[tuple[str, str, tuple[int, ...]], Any] = {}
        self._buffers = self._allocate()
        self._bound = {(f.entry, f.rows): self._bind(f) for f in manifest.functions}
        self._rows: dict[tuple[str, bool], tuple[int, ...]] = {}
        for f in sorted(manifest.functions, key=lambda f: f.rows):
            for every_row in {False, not f.last_only}:
                self._rows[f.entry, every_row] = (*self._rows.get((f.entry, every_row), ()), f.rows)

    @classmethod
    def open(cls, directory: str | Path, threads: int | None = None, *, verify: bool = False) -> Engine:
        """Check and load an artifact; its code runs in this process, so open only what you trust.

        Raises:
            ArtifactError: the artifact is damaged or was made for another CPU.
        """
        return cls(open_artifact(Path(directory), verify=verify), threads)

    def rows(self, entry: str, *, every_row: bool = False) -> tuple[int, ...]:
        """Row counts that `entry` was compiled for, ascending; `every_row`: those that output each row."""
        sizes = self._rows.get((entry, every_row))
        if sizes is None:
            raise InputError(f"the artifact has no entry {entry!r}; it has {', '.join(self.entries)}")
        return sizes

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the compiled entries."""
        return tuple(dict.fromkeys(entry for entry, _ in self._bound))

    def step(self, entry: str, tokens: Sequence[int], start: int) -> np.ndarray:
        """Feed `tokens` at positions `start`, `start + 1`, ...; return the greedy next token after each.

        The result (int32 `[len(tokens)]`, or `[1]` of a function that outputs the last row only) is a view
        that the next such step overwrites.

        Raises:
            InputError: no function takes that many rows, the cache ends before, or a token is not in the
                vocabulary.
        """
        key = (entry, len(tokens))
        bound = self._bound.get(key)
        if bound is None or not 0 <= start <= self.capacity - len(tokens):
            raise self._refusal(entry, len(tokens), start)
        if min(tokens) < 0 or max(tokens) >= self.manifest.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.manifest.vocab_size)
            raise InputError(f"token {wrong} is not in the model's vocabulary of {self.manifest.vocab_size}")
        bound.tokens[:] = tokens
        bound.start[0] = start
        threads = self._choice.pick(key)
        self.use_threads(threads)
        began = time.perf_counter()
        bound.call(*bound.args)
        self._choice.report(key, threads, time.perf_counter() - began)
        return bound.next

    def use_threads(self, count: int) -> None:
        """Let compiled code that is called next run on `count` threads; `step` chooses for itself."""
        if count != self._threads_set:
            set_threads(count)
            self._threads_set = count

    def logits(self, entry: str, rows: int) -> np.ndarray:
        """Return the float32 `[rows or 1, vocab]` logits of the last `rows`-row step of `entry`, as a view.

        Raises:
            InputError: there is no such function, or it was compiled to give tokens only.
        """
        bound = self._bound.get((entry, rows))
        if bound is None:
            raise self._refusal(entry, rows, 0)
        if bound.logits is None:
            raise InputError(f"entry {entry!r} with {rows} rows was compiled to give tokens, not logits")
        return bound.logits

    def step_bytes(self, entry: str, rows: int, end: int) -> int:
        """Bytes of weights and cache that one step must read whose last row is at position `end - 1`."""
        function = next(f for f in self.manifest.functions if (f.entry, f.rows) == (entry, rows))
        total = 0.0
        for arg in {arg.name: arg for arg in function.args}.values():
            if arg.kind == "cache":
                total += arg.nbytes * end / self.capacity
            elif arg.kind == "weight":
                total += arg.nbytes * (min(1.0, rows / arg.shape[0]) if arg.gathered else 1.0)
        return round(total)

    def _refusal(self, entry: str, rows: int, start: int) -> InputError:
        sizes = self.rows(entry)
        if rows not in sizes:
            return InputError(
                f"entry {entry!r} takes {', '.join(map(str, sizes))} rows at a time, not {rows}"
            )
        return InputError(
            f"positions {start} to {start + rows - 1} do not fit the cache of {self.capacity} positions: "
            f"compile with a larger `--context`"
        )

    def _allocate(self) -> dict[str, np.ndarray]:
        """Make one zeroed buffer for each cache and scratch name, as large as its largest user needs."""
        needed = {**self.manifest.sizes("cache"), **self.manifest.sizes("scratch")}
        return {name: aligned(size) for name, size in needed.items()}

    def _bind(self, function: Function) -> _Bound:
        arrays = {arg.name: self._array(arg) for arg in function.args}
        by_kind = {arg.kind: arrays[arg.name] for arg in function.args}
        missing = {"tokens", "start", "next"} - by_kind.keys()
        if missing:
            raise ArtifactError(f"function {function.symbol!r} takes no {missing.pop()}: compile it again")
        return _Bound(
            call=self.find(function.symbol),
            args=tuple(self._tensor(arg, arrays[arg.name]) for arg in function.args),
            tokens=by_kind["tokens"],
            start=by_kind["start"],
            next=by_kind["next"],
            logits=by_kind.get("logits"),
            last_only=function.last_only,
        )

    def _array(self, arg: Arg) -> np.ndarray:
        if arg.kind == "weight":
            found = self._weights.get(arg.name)
            if found is None or found.dtype != arg.dtype or found.nbytes != arg.nbytes:
                raise ArtifactError(
                    f"the weight file does not hold {arg.name!r} as compiled: compile it again"
                )
            return found.reshape(arg.shape)
        owned = arg.kind not in {"cache", "scratch"}
        memory = aligned(arg.nbytes) if owned else self._buffers[arg.name]
        return memory[: arg.nbytes].view(arg.dtype).reshape(arg.shape)

    def _tensor(self, arg: Arg, array: np.ndarray) -> Any:
        if arg.kind != "weight":
            return tensor(array)
        key = (arg.name, arg.dtype, arg.shape)
        if key not in self._tensors:
            self._tensors[key] = tensor(array)
        return self._tensors[key]

"""The engine: compiled functions bound once to weights, caches and buffers, then called step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specqd.artifact import Artifact, open_artifact
from specqd.errors import ArtifactError, InputError
from specqd.manifest import Arg, Function
from specqd.runtime.cpu import demand_cpu
from specqd.runtime.library import aligned, load_functions, set_threads, tensor
from specqd.runtime.output import Output
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
    output: Output
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
        self._levels = {name: manifest.level(name) for name in {f.entry for f in manifest.functions}}
        self.threads = threads or available_cpus()
        self._choice = ThreadChoice(self.threads)
        self._threads_set = 0
        self.seconds = 0.0  # spent in compiled code so far
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
        """Feed `tokens` as `feed` does; return the greedy next token after each (int32, a view)."""
        return self.feed(entry, tokens, start).next[: len(tokens)]

    def feed(self, entry: str, tokens: Sequence[int], start: int) -> Output:
        """Feed `tokens` at positions `start`, `start + 1`, ...; return what the entry says after each.

        Without a function of just so many rows, the next larger one that outputs each row runs; what its last
        rows leave in the cache is overwritten before it is seen. The result has a row a token (or one, of a
        function that outputs the last row only); it is a view that the next such pass overwrites.

        Raises:
            InputError: no function takes that many rows, the cache ends before, or a token is not in the
                vocabulary.
        """
        rows, count = self._padded(entry, len(tokens), start), len(tokens)
        key = (entry, rows)
        bound, vocabulary = self._bound[key], self._levels[entry].vocab_size
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            tokens = self._known(tokens, vocabulary)
        bound.tokens[:count] = tokens
        bound.tokens[count:] = tokens[-1]
        bound.start[0] = start
        threads = self._choice.pick(key)
        self.use_threads(threads)
        began = time.perf_counter()
        bound.call(*bound.args)
        taken = time.perf_counter() - began
        self.seconds += taken
        self._choice.report(key, threads, taken)
        return bound.output

    def room(self, entry: str, start: int) -> int:
        """Most rows that `feed` takes at once from position `start` and outputs each of; 0 at the cache's end."""
        left = self._levels[entry].capacity - start
        return max((rows for rows in self.rows(entry, every_row=True) if rows <= left), default=0)

    def use_threads(self, count: int) -> None:
        """Let compiled code that is called next run on `count` threads; `step` chooses for itself."""
        if count != self._threads_set:
            set_threads(count)
            self._threads_set = count

    def logits(self, entry: str, rows: int) -> np.ndarray:
        """Return the float32 `[rows or 1, vocab]` logits of the last pass of the `rows`-row function, a view.

        Raises:
            InputError: there is no such function, or it was compiled to give tokens only.
        """
        bound = self._bound.get((entry, rows))
        if bound is None:
            raise self._no_function(entry, rows)
        if bound.output.logits is None:
            raise InputError(f"entry {entry!r} with {rows} rows was compiled to give tokens, not logits")
        return bound.output.logits

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

    def _padded(self, entry: str, count: int, start: int) -> int:
        """Rows of the function that takes `count` tokens from position `start`."""
        left = self._levels[entry].capacity - start if entry in self._levels else 0
        if (entry, count) in self._bound and start >= 0 and count <= left:
            return count
        every_row = self.rows(entry, every_row=True)
        larger = [rows for rows in every_row if count <= rows <= left]
        if not larger or count < 1 or start < 0:
            raise self._refusal(entry, count, start)
        return larger[0]

    def _known(self, tokens: Sequence[int], vocabulary: int) -> list[int]:
        """Let a draft with a smaller vocabulary see token 0 for what it does not know."""
        of_target = self.manifest.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < of_target), None)
        if wrong is not None:
            raise InputError(f"token {wrong} is not in the model's vocabulary of {of_target}")
        return [token if token < vocabulary else 0 for token in tokens]

    def _refusal(self, entry: str, rows: int, start: int) -> InputError:
        sizes = self.rows(entry)
        if not 1 <= rows <= sizes[-1]:
            return self._no_function(entry, rows)
        return InputError(
            f"positions {start} to {start + rows - 1} do not fit the cache of "
            f"{self._levels[entry].capacity} positions: compile with a larger `--context`"
        )

    def _no_function(self, entry: str, rows: int) -> InputError:
        sizes = ", ".join(map(str, self.rows(entry)))
        return InputError(f"entry {entry!r} takes {sizes} rows at a time, not {rows}")

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
            output=self._output(by_kind),
            last_only=function.last_only,
        )

    def _output(self, by_kind: Mapping[Any, np.ndarray]) -> Output:
        rows = len(by_kind["next"])
        logits, sums = by_kind.get("logits"), by_kind.get("sums")
        return Output(
            by_kind["next"],
            None if logits is None else logits.reshape(rows, -1),
            None if sums is None else sums.reshape(rows, 2),
            self.manifest.vocab_size,
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

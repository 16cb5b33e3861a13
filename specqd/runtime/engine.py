"""The engine: compiled functions bound once to weights, caches and buffers, then called step by step."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specqd.artifact import Artifact, open_artifact
from specqd.errors import ArtifactError, InputError
from specqd.manifest import BLOCK, OBSERVER
from specqd.runtime.binding import Bound, Memory, bind
from specqd.runtime.blocks import BlockTables, pool_size
from specqd.runtime.cpu import demand_cpu
from specqd.runtime.crowding import Crowding
from specqd.runtime.draft_selection import DraftSelection
from specqd.runtime.library import load_functions, set_threads
from specqd.runtime.output import Output
from specqd.runtime.recent import RecentBlocks
from specqd.runtime.selecting import Schedule
from specqd.runtime.selections import drops, selection_of, tables_size
from specqd.runtime.threads import ThreadChoice, available_cpus
from specqd.runtime.tiles import permit_tiles
from specqd.weightfile import read_weights

__all__ = ["Engine", "Piece"]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a sequence, to be fed at positions `start`, `start + 1`, ..."""

    tokens: Sequence[int]
    start: int
    sequence: int = 0


class Engine:
    """Runs the compiled functions of an artifact on the caches of one or several sequences.

    `feed` feeds consecutive positions to an entry; positions it feeds again are overwritten in the caches,
    and later ones are ignored. By default the thread count follows what is fastest at the time
    (`ThreadChoice`) up to `threads`, itself by default the CPUs this process may use. The caches hold `positions`
    positions of all sequences together, or what fits into `cache_mb` megabytes (10^6 bytes), by default all that
    `sequences` sequences may have. `prefix_sharing`: sequences that begin alike may share blocks of them.
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        *,
        sequences: int = 1,
        positions: int | None = None,
        cache_mb: float | None = None,
        prefix_sharing: bool = True,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"cannot run on {threads} threads: give 1 or more")
        manifest = artifact.manifest
        if manifest.module is not None:
            raise ArtifactError(
                f"{artifact.directory} is no language model: load it with `specqd.load`, and call what that gives"
            )
        demand_cpu(manifest.triple, manifest.cpu_features)
        if "amx_tile" in manifest.cpu_features:
            permit_tiles()
        self.artifact = artifact
        self.manifest = manifest
        pool = pool_size(manifest, sequences, positions, cache_mb)
        self.tables = BlockTables(sequences, manifest.capacity, pool, sequences * tables_size(manifest))
        self._slots = min(manifest.capacity, pool * BLOCK)
        self.capacity = (manifest.max_positions or sys.maxsize) if drops(manifest) else self._slots
        self.vocab_size = manifest.vocab_size
        self._levels = {name: manifest.level(name) for name in {f.entry for f in manifest.functions}}
        self._caches = {name: frozenset(manifest.sizes("cache", name)) for name in self.entries}
        self.threads = threads or available_cpus()
        self._choice = ThreadChoice(self.threads, Crowding())
        self._threads_set = 0
        self.seconds = 0.0  # spent in compiled code so far
        self.find = load_functions(artifact.library, self.threads)
        self.memory = Memory(manifest, read_weights(artifact.weights), self.tables)
        self.recent = RecentBlocks(manifest, self.tables)
        # What is moved within a cache is no longer the text that others know.
        self.prefix_sharing = prefix_sharing and not drops(manifest) and self.recent.shares
        self._selection = selection_of(manifest, self.tables, self.memory, self.find)
        self._bound = {
            (f.entry, f.rows): bind(f, self.find(f.symbol), self.memory) for f in manifest.functions
        }
        self._rows: dict[tuple[str, bool], tuple[int, ...]] = {}
        for f in sorted(manifest.functions, key=lambda f: f.rows):
            for every_row in {False, not f.last_only}:
                self._rows[f.entry, every_row] = (*self._rows.get((f.entry, every_row), ()), f.rows)
        # Rows of the largest pass that outputs each, and positions that the caches hold.
        self._most = {
            name: (
                max(self._rows.get((name, True), (0,))),
                self.capacity if drops(manifest) else min(level.capacity, self.capacity),
            )
            for name, level in self._levels.items()
        }

    @classmethod
    def open(
        cls,
        directory: str | Path,
        threads: int | None = None,
        *,
        sequences: int = 1,
        positions: int | None = None,
        cache_mb: float | None = None,
        prefix_sharing: bool = True,
        verify: bool = False,
    ) -> Engine:
        """Check and load an artifact; its code runs in this process, so open only what you trust.

        Raises:
            ArtifactError: the artifact is damaged or was made for another CPU.
        """
        artifact = open_artifact(Path(directory), verify=verify)
        return cls(
            artifact,
            threads,
            sequences=sequences,
            positions=positions,
            cache_mb=cache_mb,
            prefix_sharing=prefix_sharing,
        )

    def rows(self, entry: str, *, every_row: bool = False) -> tuple[int, ...]:
        """Row counts that `entry` was compiled for, ascending; `every_row`: those that output each row."""
        sizes = self._rows.get((entry, every_row))
        if sizes is None:
            raise InputError(f"the artifact has no entry {entry!r}; it has {', '.join(self.entries)}")
        return sizes

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the compiled entries that can be levels of a plan."""
        return tuple(dict.fromkeys(f.entry for f in self.manifest.functions if f.entry != OBSERVER))

    def schedule(self) -> Schedule | None:
        """When to select positions of a new text; None if that is never done."""
        selection = self.manifest.selection
        return Schedule(selection, self._slots, drops(self.manifest)) if selection else None

    def slots(self, positions: int) -> int:
        """Most positions that the caches ever hold of a text of so many."""
        return min(positions, self._slots)

    def caches(self, entry: str) -> frozenset[str]:
        """Names of the caches that an entry uses."""
        return self._caches[entry]

    def contested(self, entry: str) -> bool:
        """Whether another entry can write to a cache of this one."""
        return any(name != entry and caches & self._caches[entry] for name, caches in self._caches.items())

    def step(self, entry: str, tokens: Sequence[int], start: int) -> np.ndarray:
        """Feed `tokens` as `feed` does; return the greedy next token after each (int32, a view)."""
        return self.feed(entry, tokens, start).next[: len(tokens)]

    def feed(self, entry: str, tokens: Sequence[int], start: int, sequence: int = 0) -> Output:
        """Feed `tokens` at positions `start`, `start + 1`, ... of a sequence; return what the entry says after each.

        Without a function of just so many rows, the next larger one that outputs each row runs. The result has a row
        a token (or one, of a function that outputs the last row only); it is a view that the next such pass
        overwrites.

        Raises:
            InputError: no function takes that many rows, the cache ends before, or a token is not in the
                vocabulary.
        """
        return self.feed_pieces(entry, (Piece(tokens, start, sequence),))

    def feed_pieces(self, entry: str, pieces: Sequence[Piece]) -> Output:
        """Feed pieces of different sequences in one pass, as `feed` feeds one; the result has their rows in order.

        What a sequence gets is the same, bit for bit, as if it were fed alone.
        """
        count = sum(len(piece.tokens) for piece in pieces)
        rows = self._fitting(entry, count, len(pieces) > 1)
        key = (entry, rows)
        bound, vocabulary, (_, capacity) = self._bound[key], self._levels[entry].vocab_size, self._most[entry]
        first = 0
        for piece in pieces:
            tokens, start, last = piece.tokens, piece.start, first + len(piece.tokens)
            end = start + len(tokens)
            if start < 0 or end > capacity:
                raise self._does_not_fit(entry, start, end)
            if min(tokens) < 0 or max(tokens) >= vocabulary:
                tokens = self._known(tokens, vocabulary)
            self.recent.feed(entry, piece.sequence, start, end)
            self.tables.hold(piece.sequence, end - self.tables.dropped(piece.sequence))
            bound.tokens[first:last] = tokens
            bound.positions[first:last] = range(start, end)
            bound.tables[first:last] = self._begin(entry, piece.sequence, end)
            first = last
        if count < rows:
            for given in (bound.tokens, bound.positions, bound.tables):
                given[count:] = given[count - 1]  # the last row again, which changes nothing
        threads = self._choice.pick(key)
        self.use_threads(threads)
        began = time.perf_counter()
        bound.call(*bound.args)
        taken = time.perf_counter() - began
        self.seconds += taken
        self._choice.report(key, threads, taken)
        if entry == OBSERVER:
            self._select(bound, pieces[0])
        return bound.output

    def _begin(self, entry: str, sequence: int, end: int) -> int:
        """Where the tables begin by which an entry finds the sequence's positions, up to `end`."""
        selection = self._selection
        own = None
        if isinstance(selection, DraftSelection) and entry == selection.entry:
            own = selection.begin(sequence, end)
        return self.tables.begin(sequence) if own is None else own

    def _select(self, bound: Bound, piece: Piece) -> None:
        """Select positions of a sequence by what the observer saw."""
        assert self._selection is not None
        assert bound.received is not None
        length = piece.start + len(piece.tokens)
        self._selection.select(piece.sequence, length, bound.received.reshape(self.manifest.planes, -1))

    def room(self, entry: str, start: int) -> int:
        """Most rows that `feed` takes at once from position `start` and outputs each of; 0 at the cache's end."""
        most, capacity = self._most[entry]
        return max(0, min(most, capacity - start))

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
                total += arg.nbytes * end / BLOCK
            elif arg.kind == "weight":
                total += arg.nbytes * (min(1.0, rows / arg.shape[0]) if arg.gathered else 1.0)
        return round(total)

    def _fitting(self, entry: str, count: int, every_row: bool) -> int:
        """Rows of the function that takes `count` of them; with `every_row`, one that outputs each."""
        if not every_row and (entry, count) in self._bound:
            return count
        sizes = self.rows(entry, every_row=True)
        if not 1 <= count <= sizes[-1]:
            raise self._no_function(entry, count)
        return next(rows for rows in sizes if count <= rows)

    def _known(self, tokens: Sequence[int], vocabulary: int) -> list[int]:
        """Let a draft with a smaller vocabulary see token 0 for what it does not know."""
        of_target = self.manifest.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < of_target), None)
        if wrong is not None:
            raise InputError(f"token {wrong} is not in the model's vocabulary of {of_target}")
        return [token if token < vocabulary else 0 for token in tokens]

    def _does_not_fit(self, entry: str, start: int, end: int) -> InputError:
        return InputError(
            f"positions {start} to {end - 1} do not fit the cache of "
            f"{min(self._levels[entry].capacity, self.capacity)} positions: compile with a larger `--context`"
        )

    def _no_function(self, entry: str, rows: int) -> InputError:
        sizes = ", ".join(map(str, self.rows(entry)))
        return InputError(f"entry {entry!r} takes {sizes} rows at a time, not {rows}")

"""What the target keeps of its cache: for each plane the positions that matter, moved to the front."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from specqd.manifest import CacheRecord, Manifest, Selection
from specqd.runtime.binding import Memory
from specqd.runtime.blocks import BlockTables
from specqd.runtime.library import aligned, tensor
from specqd.runtime.observing import Observing
from specqd.selection import keep, method

__all__ = ["TargetSelection"]


class TargetSelection:
    """Drops positions from the caches of the target, and gives their blocks back."""

    def __init__(
        self,
        manifest: Manifest,
        selection: Selection,
        tables: BlockTables,
        memory: Memory,
        find: Callable[[str], Callable[..., None]],
    ) -> None:
        self._selection, self._tables = selection, tables
        self._method = method(selection.method, **selection.options)
        self._observing = Observing(manifest, selection, self._method, tables, memory)
        self._movers = {
            name: _Mover(name, selection, cache, tables, memory, find)
            for name, cache in self._observing.caches.items()
        }
        # Of each sequence: which text of it, and for each cache where its slots stood in that, int32 [planes, slots].
        self._stood: dict[int, tuple[int, dict[str, np.ndarray]]] = {}

    def select(self, sequence: int, length: int, received: np.ndarray) -> None:
        """Keep some of the positions that the caches hold of the sequence's first `length`.

        `received`: float32 `[planes, >= slots]`, the mean over the queries that were looked at.
        """
        selection, tables, observing = self._selection, self._tables, self._observing
        slots = length - tables.dropped(sequence)
        if slots <= selection.tokens:
            return
        stood = self._now(sequence, length, slots)
        always = {"sinks": selection.sinks, "recent": selection.recent}
        for name, here, observed in observing.layers(sequence, received, stood):
            chosen = keep(self._method, observed, selection.tokens, **always)
            self._movers[name].kept[here] = chosen
            observing.carry(sequence, name, observed, chosen)
        for name, mover in self._movers.items():
            mover(sequence)
            stood[name] = np.take_along_axis(stood[name], mover.kept, axis=1)
        tables.drop(sequence, length, selection.tokens)

    def _now(self, sequence: int, length: int, slots: int) -> dict[str, np.ndarray]:
        """Return where the slots of each cache stand in the text, those that came since the last selection too."""
        text, stood = self._stood.get(sequence, (-1, {}))
        if text != self._tables.texts[sequence]:
            stood = {n: np.empty((c.planes, 0), np.int32) for n, c in self._observing.caches.items()}
            self._stood[sequence] = self._tables.texts[sequence], stood
        for name, known in stood.items():
            new = np.arange(length - (slots - known.shape[1]), length, dtype=np.int32)
            stood[name] = np.concatenate([known, np.broadcast_to(new, (len(known), len(new)))], axis=1)
        return stood


class _Mover:
    """The compiled function that moves one cache, and what it is called with."""

    def __init__(
        self,
        name: str,
        selection: Selection,
        cache: CacheRecord,
        tables: BlockTables,
        memory: Memory,
        find: Callable[[str], Callable[..., None]],
    ) -> None:
        self._begin = tables.begin
        self._where = aligned(8).view(np.int32)
        self._where[1] = selection.tokens
        size = cache.planes * selection.tokens
        self.kept = aligned(size * 4).view(np.int32).reshape(cache.planes, selection.tokens)
        self._call = find(f"move_{name}")
        arrays = (*memory.cache(name), tables.flat, self._where, self.kept.reshape(-1))
        self._arguments = [tensor(array) for array in arrays]

    def __call__(self, sequence: int) -> None:
        """Move what is `kept` of a sequence."""
        self._where[0] = self._begin(sequence)
        self._call(*self._arguments)

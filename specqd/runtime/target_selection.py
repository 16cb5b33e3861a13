"""What the target keeps of its cache: for each plane the positions that matter, moved to the front."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from specqd.manifest import CacheRecord, Manifest, SelectionRecord
from specqd.runtime.binding import Memory
from specqd.runtime.blocks import BlockTables
from specqd.runtime.library import aligned, tensor
from specqd.selection import Observed, compact, keep, method

__all__ = ["TargetSelection"]


class TargetSelection:
    """Drops positions from the caches of the target, and gives their blocks back."""

    entry = ""  # no entry has tables of its own

    def __init__(
        self,
        manifest: Manifest,
        record: SelectionRecord,
        tables: BlockTables,
        memory: Memory,
        find: Callable[[str], Callable[..., None]],
    ) -> None:
        self._record, self._tables = record, tables
        self._method = method(record.method, **record.options)
        self._caches = manifest.caches
        self._movers = {
            name: _Mover(name, record, cache, tables, memory, find) for name, cache in self._caches.items()
        }
        # Of each sequence: which text of it, then for each cache where its slots stood, and what is carried.
        self._state: dict[int, tuple[int, dict[str, np.ndarray], dict[tuple[str, int], np.ndarray]]] = {}

    def begin(self, sequence: int, end: int) -> None:
        """Return nothing: all entries follow the tables of the sequence."""

    def select(self, sequence: int, length: int, received: np.ndarray) -> None:
        """Keep the record's number of the positions that the caches hold of the sequence's first `length`.

        `received`: float32 `[planes, >= slots]`, the mean over the queries that were looked at.
        """
        record, tables = self._record, self._tables
        slots = length - tables.dropped(sequence)
        if slots <= record.tokens:
            return
        stood, carried = self._known(sequence, length, slots)
        for name, cache in self._caches.items():
            kept = self._movers[name].kept
            for layer in range(cache.layers):
                here = slice(layer * cache.kv_heads, (layer + 1) * cache.kv_heads)
                planes = slice(cache.first_plane + here.start, cache.first_plane + here.stop)
                observed = Observed(
                    stood[name][here],
                    measured=received[planes, :slots],
                    carried=_extended(carried.get((name, layer)), slots),
                    layer=layer,
                    layers=cache.layers,
                )
                chosen = keep(self._method, observed, record.tokens, sinks=record.sinks, recent=record.recent)
                kept[here] = chosen
                more = self._method.carry(observed)
                if more is not None:
                    carried[name, layer] = compact(more, chosen)
            stood[name] = np.take_along_axis(stood[name], kept, axis=1)
            self._movers[name](sequence)
        tables.drop(sequence, length, record.tokens)

    def _known(
        self, sequence: int, length: int, slots: int
    ) -> tuple[dict[str, np.ndarray], dict[tuple[str, int], np.ndarray]]:
        """Return where the slots of each cache stand in the text, and what is carried for the older ones."""
        text, stood, carried = self._state.get(sequence, (-1, {}, {}))
        if text != self._tables.texts[sequence]:
            stood = {
                name: np.empty((cache.layers * cache.kv_heads, 0), np.int32)
                for name, cache in self._caches.items()
            }
            carried = {}
            self._state[sequence] = self._tables.texts[sequence], stood, carried
        for name, known in stood.items():
            new = np.arange(length - (slots - known.shape[1]), length, dtype=np.int32)
            stood[name] = np.concatenate([known, np.broadcast_to(new, (len(known), len(new)))], axis=1)
        return stood, carried


class _Mover:
    """The compiled function that moves one cache, and what it is called with."""

    def __init__(
        self,
        name: str,
        record: SelectionRecord,
        cache: CacheRecord,
        tables: BlockTables,
        memory: Memory,
        find: Callable[[str], Callable[..., None]],
    ) -> None:
        planes = cache.layers * cache.kv_heads
        self._begin = tables.begin
        self._where = aligned(8).view(np.int32)
        self._where[1] = record.tokens
        self.kept = aligned(planes * record.tokens * 4).view(np.int32).reshape(planes, record.tokens)
        self._call = find(f"move_{name}")
        arrays = (*memory.cache(name), tables.flat, self._where, self.kept.reshape(-1))
        self._arguments = [tensor(array) for array in arrays]

    def __call__(self, sequence: int) -> None:
        """Move what is `kept` of a sequence."""
        self._where[0] = self._begin(sequence)
        self._call(*self._arguments)


def _extended(carried: np.ndarray | None, slots: int) -> np.ndarray | None:
    if carried is None:
        return None
    return np.pad(carried, ((0, 0), (0, slots - carried.shape[1])))

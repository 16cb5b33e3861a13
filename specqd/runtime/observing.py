"""What a selection is shown of each layer, and what it carries on to the next one of the same text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from specqd.manifest import OBSERVER, Manifest, Selection
from specqd.runtime.binding import Memory
from specqd.runtime.blocks import BlockTables, blocks_for
from specqd.runtime.cached_keys import cached_keys
from specqd.selection import Method, Observed, compact

__all__ = ["Observing"]


class Observing:
    """The caches that the observer sees, and what `method` carries for each layer of each sequence's text."""

    def __init__(
        self, manifest: Manifest, selection: Selection, method: Method, tables: BlockTables, memory: Memory
    ) -> None:
        seen = manifest.sizes("cache", OBSERVER)
        self.caches = {name: cache for name, cache in manifest.caches.items() if f"{name}_k" in seen}
        self._method, self._window = method, selection.window
        self._tables, self._memory = tables, memory
        self._carried: dict[int, tuple[int, dict[tuple[str, int], np.ndarray]]] = {}

    def layers(
        self, sequence: int, received: np.ndarray, stood: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, slice, Observed]]:
        """Yield each layer: its cache, its planes in that, and what is observed of its slots.

        `received`: float32 `[planes, >= slots]`, the mean over the queries that were looked at; `stood`: for each cache
        int32 `[planes, slots]`, where in the text the slots stood. Keys are read where the method needs them, a layer's
        at a time.
        """
        carried = self._of(sequence)
        for name, cache in self.caches.items():
            slots = stood[name].shape[1]
            for layer in range(cache.layers):
                here = slice(layer * cache.kv_heads, (layer + 1) * cache.kv_heads)
                planes = slice(cache.first_plane + here.start, cache.first_plane + here.stop)
                before = carried.get((name, layer))
                if before is not None:
                    before = np.pad(before, ((0, 0), (0, slots - before.shape[1])))
                yield (
                    name,
                    here,
                    Observed(
                        stood[name][here],
                        keys=self._keys(sequence, name, here, slots),
                        measured=received[planes, :slots],
                        window=self._window,
                        carried=before,
                        layer=layer,
                        layers=cache.layers,
                    ),
                )

    def carry(self, sequence: int, name: str, observed: Observed, kept: np.ndarray | None = None) -> None:
        """Remember what the method carries on of a layer's slots, or of those that are `kept`."""
        more = self._method.carry(observed)
        if more is not None:
            self._of(sequence)[name, observed.layer] = more if kept is None else compact(more, kept)

    def _keys(self, sequence: int, name: str, here: slice, slots: int) -> np.ndarray | None:
        if "keys" not in self._method.needs:
            return None
        blocks = self._tables.blocks(sequence)[: blocks_for(slots)]
        keys, _ = self._memory.cache(name)
        planes = keys.reshape(self.caches[name].planes, self._tables.pool, -1)
        return cached_keys(self.caches[name].key_dtype, planes[here, blocks])[:, :slots]

    def _of(self, sequence: int) -> dict[tuple[str, int], np.ndarray]:
        """Return what is carried of the sequence's text, which is nothing of a new one."""
        text = self._tables.texts[sequence]
        if sequence not in self._carried or self._carried[sequence][0] != text:
            self._carried[sequence] = text, {}
        return self._carried[sequence][1]

"""What a draft sees of the target's cache: for each plane the blocks that matter, by a table of its own."""

from __future__ import annotations

import numpy as np

from specqd.manifest import BLOCK, Manifest, Selection
from specqd.runtime.blocks import BlockTables, blocks_for
from specqd.runtime.observing import Observing
from specqd.selection import KVCrush, Method, method

__all__ = ["DraftSelection", "tables_size"]

_MOST_ROWS = 128  # of a pass, which may come before the next selection


def tables_size(manifest: Manifest, selection: Selection) -> int:
    """Entries of a sequence's tables: how far they are apart, and for each plane what is missing, then blocks."""
    return 1 + manifest.planes * _size(selection)


def _size(selection: Selection) -> int:
    return 3 + blocks_for(selection.tokens + selection.every + _MOST_ROWS)


class DraftSelection:
    """Tables, one a plane, of blocks that a selection kept and those that came after it.

    The blocks are the target's: nothing is copied, and the target sees all of them. Whole blocks are selected, since a
    single position of one takes as long to read as all 16.
    """

    def __init__(self, manifest: Manifest, selection: Selection, tables: BlockTables) -> None:
        self.entry = selection.entry
        self._selection, self._tables = selection, tables
        self._observing = Observing(manifest, tables)
        self._planes = manifest.planes
        self._size, self._each = _size(selection), tables_size(manifest, selection)
        self._method = _of_pages(method(selection.method, **selection.options))
        # Of each sequence: which text of it was selected from, blocks of the text in its tables, of those missing.
        self._state: dict[int, tuple[int, int, int]] = {}

    def begin(self, sequence: int, end: int) -> int | None:
        """Return where the sequence's tables begin in `flat`, made to hold `end` positions; None if it has none."""
        text, known, missing = self._state.get(sequence, (-1, 0, 0))
        tables = self._tables
        wanted = blocks_for(end)
        if text != tables.texts[sequence] or wanted - missing >= self._size:
            return None
        if known < wanted:
            mine = self._of(sequence)
            for place in range(known, wanted):
                mine[:, 1 + place - missing] = tables.block(sequence, place)
            self._state[sequence] = text, wanted, missing
        return len(tables.flat) - len(tables.beside) + sequence * self._each

    def select(self, sequence: int, length: int, received: np.ndarray) -> None:
        """Choose blocks of the sequence's first `length` positions by what they `received`.

        It is float32 `[planes, >= length]`, the mean over the queries that were looked at.
        """
        selection, tables = self._selection, self._tables
        blocks = blocks_for(length)
        first, newest = blocks_for(selection.sinks), max(0, length - selection.recent) // BLOCK
        count = selection.tokens // BLOCK - first - (blocks - newest)
        if count < 1 or newest - first <= count:
            self._state.pop(sequence, None)
            return
        main = np.array(tables.blocks(sequence)[:blocks], np.int32)
        chosen = self._chosen(sequence, received, first, newest, count)
        missing = newest - first - count
        mine = self._of(sequence)
        mine[:, 0] = missing * BLOCK
        mine[:, 1 : 1 + first] = main[:first]
        mine[:, 1 + first : 1 + first + count] = main[chosen]
        mine[:, 1 + first + count : 1 + blocks - missing] = main[newest:]
        self._state[sequence] = tables.texts[sequence], blocks, missing

    def _of(self, sequence: int) -> np.ndarray:
        """The sequence's tables, int32 `[planes, size]`; what comes before them says how far they are apart."""
        mine = self._tables.beside[sequence * self._each : (sequence + 1) * self._each]
        mine[0] = self._size
        return mine[1:].reshape(self._planes, self._size)

    def _chosen(self, sequence: int, received: np.ndarray, first: int, newest: int, count: int) -> np.ndarray:
        """Return int32 `[planes, count]`: the blocks between the first and the newest to keep, ascending."""
        observing, slots = self._observing, np.arange(newest * BLOCK, dtype=np.int32)
        stood = {name: np.broadcast_to(slots, (c.planes, len(slots))) for name, c in observing.caches.items()}
        candidates = slice(first * BLOCK, newest * BLOCK)
        chosen = np.zeros((self._planes, count), np.int32)
        for name, here, observed in observing.layers(sequence, received, stood):
            kept = self._method.choose(observed, candidates, count * BLOCK)
            pages = np.sort(kept.reshape(len(kept), count, BLOCK)[:, :, 0] // BLOCK, axis=1)
            chosen[observing.caches[name].first_plane :][here] = pages
            observing.carry(sequence, name, self._method, observed)
        return chosen


def _of_pages(selecting: Method) -> Method:
    """Make a method choose whole blocks."""
    if isinstance(selecting, KVCrush):
        return KVCrush(selecting.scorer, selecting.share, selecting.anchor, selecting.seed, BLOCK)
    return KVCrush(selecting, share=0.0, page=BLOCK)

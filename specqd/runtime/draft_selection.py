"""What a draft sees of the target's cache: for each plane the blocks that matter, by a table of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from specqd.manifest import BLOCK, LONGEST_PASS, Manifest, Selection
from specqd.runtime.binding import Memory
from specqd.runtime.blocks import BlockTables, blocks_for
from specqd.runtime.observing import Observing
from specqd.selection import KVCrush, Method, layer_budgets, method

__all__ = ["DraftSelection", "tables_size"]


def tables_size(manifest: Manifest, selection: Selection) -> int:
    """Entries of a sequence's tables: how far they are apart, and for each plane what is missing, then blocks."""
    return 1 + manifest.planes * _size(manifest, selection)


def _size(manifest: Manifest, selection: Selection) -> int:
    shares = method(selection.method, **selection.options).shares
    tokens = max(max(shares(cache.layers, selection.tokens, math.inf)) for cache in manifest.caches.values())
    return 3 + blocks_for(math.ceil(tokens) + selection.every + LONGEST_PASS)


class DraftSelection:
    """Tables, one a plane, of blocks that a selection kept and those that came after it.

    The blocks are the target's: nothing is copied, and the target sees all of them. Whole blocks are selected, since a
    single position of one takes as long to read as all 16. A method may divide the blocks among the layers as it likes.
    """

    def __init__(self, manifest: Manifest, selection: Selection, tables: BlockTables, memory: Memory) -> None:
        self.entry = selection.entry
        self._selection, self._tables = selection, tables
        self._planes = manifest.planes
        self._size, self._each = _size(manifest, selection), tables_size(manifest, selection)
        self._method = _of_pages(method(selection.method, **selection.options))
        self._observing = Observing(manifest, selection, self._method, tables, memory)
        self._states: dict[int, _State] = {}

    def begin(self, sequence: int, end: int) -> int | None:
        """Return where the sequence's tables begin in `flat`, made to hold `end` positions; None if it has none."""
        tables, state, wanted = self._tables, self._states.get(sequence), blocks_for(end)
        if state is None or state.text != tables.texts[sequence] or wanted > state.most:
            return None
        if state.known < wanted:
            mine, planes = self._of(sequence), np.arange(self._planes)
            for place in range(state.known, wanted):
                mine[planes, 1 + place - state.missing] = tables.block(sequence, place)
            state.known = wanted
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
            self._states.pop(sequence, None)
            return
        main = np.array(tables.blocks(sequence)[:blocks], np.int32)
        # A plane that the observer does not see is none of the draft's: what its table lacks does not matter.
        missing, mine = np.full(self._planes, newest - first - count, np.int32), self._of(sequence)
        for planes, chosen in self._chosen(sequence, length, received, slice(first, newest), count):
            missing[planes] = newest - first - chosen.shape[1]
            row, end = mine[planes], 1 + first + chosen.shape[1]
            row[:, 0] = missing[planes] * BLOCK
            row[:, 1 : 1 + first] = main[:first]
            row[:, 1 + first : end] = main[chosen]
            row[:, end : end + blocks - newest] = main[newest:]
        most = self._size - 1 + int(missing.min())
        self._states[sequence] = _State(tables.texts[sequence], blocks, missing, most)

    def _of(self, sequence: int) -> np.ndarray:
        """The sequence's tables, int32 `[planes, size]`; what comes before them says how far they are apart."""
        mine = self._tables.beside[sequence * self._each : (sequence + 1) * self._each]
        mine[0] = self._size
        return mine[1:].reshape(self._planes, self._size)

    def _chosen(
        self, sequence: int, length: int, received: np.ndarray, candidates: slice, mean: int
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield of each layer its planes, and int32 `[kv_heads, blocks]`: which candidates to keep, ascending.

        That are `mean` blocks of a layer of each cache on average.
        """
        observing, slots = self._observing, np.arange(length, dtype=np.int32)
        stood = {name: np.broadcast_to(slots, (c.planes, length)) for name, c in observing.caches.items()}
        positions = slice(candidates.start * BLOCK, candidates.stop * BLOCK)
        most = candidates.stop - candidates.start
        counts = {
            name: layer_budgets(self._method, c.layers, mean * c.layers, length=most, sinks=0, recent=0)
            for name, c in observing.caches.items()
        }
        for name, here, observed in observing.layers(sequence, received, stood):
            begin, count = observing.caches[name].first_plane, counts[name][observed.layer]
            kept = self._method.choose(observed, positions, count * BLOCK)
            pages = np.sort(kept.reshape(len(kept), count, BLOCK)[:, :, 0] // BLOCK, axis=1)
            yield slice(begin + here.start, begin + here.stop), pages
            observing.carry(sequence, name, observed)


@dataclass
class _State:
    """What the tables of a sequence hold.

    `text` of it was selected from, the `known` first blocks of that are there, except as many as `missing`, int32
    `[planes]`, says; the tables have room for the `most` first ones.
    """

    text: int
    known: int
    missing: np.ndarray
    most: int


def _of_pages(selecting: Method) -> Method:
    """Make a method choose whole blocks."""
    if isinstance(selecting, KVCrush):
        return KVCrush(selecting.scorer, selecting.share, selecting.anchor, selecting.seed, BLOCK)
    return KVCrush(selecting, share=0.0, page=BLOCK)

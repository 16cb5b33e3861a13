"""Block tables: which blocks of the caches hold which positions of which sequence (as vLLM's, arXiv 2309.06180)."""

from __future__ import annotations

import numpy as np

from specqd.errors import InputError
from specqd.manifest import BLOCK
from specqd.runtime.library import aligned

__all__ = ["BlockTables", "blocks_for"]


def blocks_for(positions: int) -> int:
    """Blocks that so many positions take."""
    return -(-positions // BLOCK)


class BlockTables:
    """Tables of `sequences` sequences of at most `capacity` positions each, over a pool of `pool` blocks.

    `flat`, int32 `[sequences * blocks_for(capacity)]`, is what compiled code reads; a sequence's table begins at
    `begin(sequence)`. Blocks are given out when positions are first fed, and `reserve` sets them aside before, so that
    a sequence that was let in never runs out of them. All caches of an engine follow the same tables.
    """

    def __init__(self, sequences: int, capacity: int, pool: int) -> None:
        self._each = 2 + blocks_for(capacity)
        self.sequences, self.pool = sequences, pool
        self.flat = aligned(sequences * self._each * 4).view(np.int32)
        self._free = list(reversed(range(pool)))
        self._held = [0] * sequences
        self._reserved = [0] * sequences
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that no sequence holds or has reserved."""
        beyond = (max(0, r - h) for r, h in zip(self._reserved, self._held, strict=True))
        return len(self._free) - sum(beyond)

    def begin(self, sequence: int) -> int:
        """Index in `flat` of the sequence's tables."""
        return sequence * self._each

    def take(self) -> int | None:
        """Return a sequence that nobody has taken, and holds nothing, until it is released; None if there is none."""
        free = next((i for i in range(self.sequences) if i not in self._taken), None)
        if free is not None:
            self.release(free)
            self._taken.add(free)
        return free

    def reserve(self, sequence: int, length: int) -> bool:
        """Set blocks aside for `length` positions of the sequence; if there are too few, do nothing and say False."""
        wanted = blocks_for(length) - max(self._held[sequence], self._reserved[sequence])
        if wanted > self.available:
            return False
        self._reserved[sequence] = max(self._reserved[sequence], blocks_for(length))
        return True

    def hold(self, sequence: int, length: int) -> None:
        """Give the sequence blocks for `length` positions, where it has not got them.

        Raises:
            InputError: there are none left.
        """
        held = self._held[sequence]
        if length <= held * BLOCK:
            return
        wanted = blocks_for(length)
        if not self.reserve(sequence, length):
            raise InputError(
                f"the cache is full: its {self.pool * BLOCK} positions are held by {sum(map(bool, self._held))} "
                "sequences; load the artifact with more `cache_tokens`, or fewer `sequences`"
            )
        for place in range(held, wanted):
            self.flat[self.begin(sequence) + 2 + place] = self._free.pop()
        self._held[sequence] = wanted

    def release(self, sequence: int) -> None:
        """Take back the sequence, with all that it holds and has reserved."""
        self._taken.discard(sequence)
        held, begin = self._held[sequence], self.begin(sequence) + 2
        self._free += reversed(self.flat[begin : begin + held].tolist())
        self._held[sequence] = self._reserved[sequence] = 0

"""Block tables: which blocks of the caches hold which positions of which sequence (as vLLM's, arXiv 2309.06180)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specqd.errors import InputError
from specqd.manifest import BLOCK, Manifest
from specqd.runtime.library import aligned
from specqd.runtime.prefix import PrefixIndex

__all__ = ["BlockTables", "blocks_for", "pool_size"]


def blocks_for(positions: int) -> int:
    """Blocks that so many positions take."""
    return -(-positions // BLOCK)


def pool_size(manifest: Manifest, sequences: int, positions: int | None, megabytes: float | None) -> int:
    """Blocks for so many sequences: what they can fill, or fewer by a budget of positions or megabytes of all caches.

    Raises:
        InputError: both budgets are given, or not even a block fits.
    """
    if positions is not None and megabytes is not None:
        raise InputError("give `cache_tokens` or `cache_mb`, not both: each says how large the cache is")
    if sequences < 1 or (positions is not None and positions < 1):
        raise InputError(f"cannot hold {sequences} sequences in {positions} positions: give 1 or more")
    most = sequences * blocks_for(manifest.capacity)
    if megabytes is not None:
        block, recent = manifest.cache_bytes(BLOCK) / 1e6, sequences * manifest.recent_bytes / 1e6
        if not megabytes >= block + recent:
            whole = (manifest.cache_bytes(manifest.capacity) + manifest.recent_bytes) / 1e6
            beside = f" beside {recent:.3g} MB for recent blocks of each sequence" if recent else ""
            raise InputError(
                f"a cache of {megabytes:g} MB holds not even a block of {BLOCK} tokens, which takes {block:.3g} MB"
                f"{beside}: give more `cache_mb` (a sequence of all {manifest.capacity} tokens takes {whole:.3g})"
            )
        return min(most, int(min((megabytes - recent) / block, most)))
    return most if positions is None else min(most, blocks_for(positions))


class BlockTables:
    """Tables of `sequences` sequences of at most `capacity` positions each, over a pool of `pool` blocks.

    `flat`, int32, is what compiled code reads; a sequence's tables begin at `begin(sequence)`, after its number, all
    planes sharing one (see Paged in codegen/kernels/cache.py), and the last of it, `beside`, are other tables. `texts`
    counts the texts that a sequence had. Blocks are given out when positions are first fed, and `reserve` sets them
    aside before, so that a sequence that was let in never runs out of them. All caches of an engine follow the same
    tables.

    Each block is either free, or held by one or more sequences (`share`), or kept: held by none, but known to `index`
    by its text. Kept blocks are given out when no others are free, the least recently used first.
    """

    def __init__(self, sequences: int, capacity: int, pool: int, beside: int = 0) -> None:
        self._each = 3 + blocks_for(capacity)
        self.sequences, self.pool = sequences, pool
        self.flat = aligned((sequences * self._each + beside) * 4).view(np.int32)
        self.flat[: sequences * self._each : self._each] = range(sequences)
        self.beside = self.flat[sequences * self._each :]
        self.texts = [0] * sequences
        self.index = PrefixIndex()
        self._free = list(reversed(range(pool)))
        self._kept: dict[int, None] = {}  # the least recently used first
        self._holders = [0] * pool
        self._held = [0] * sequences
        self._reserved = [0] * sequences
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that no sequence holds or has reserved."""
        beyond = (max(0, r - h) for r, h in zip(self._reserved, self._held, strict=True))
        return len(self._free) + len(self._kept) - sum(beyond)

    def begin(self, sequence: int) -> int:
        """Index in `flat` of the sequence's tables."""
        return sequence * self._each + 1

    def blocks(self, sequence: int) -> list[int]:
        """Return the blocks that the sequence holds, in the order of its positions."""
        begin = self.begin(sequence) + 2
        return self.flat[begin : begin + self._held[sequence]].tolist()

    def block(self, sequence: int, place: int) -> int:
        """Return the block of a sequence that holds its slots from `place * 16` on."""
        return int(self.flat[self.begin(sequence) + 2 + place])

    def take(self) -> int | None:
        """Return a sequence that nobody has taken, and holds nothing, until it is released; None if there is none."""
        free = next((i for i in range(self.sequences) if i not in self._taken), None)
        if free is not None:
            self.release(free)
            self._taken.add(free)
        return free

    def share(self, sequence: int, blocks: Sequence[int]) -> None:
        """Let a sequence that holds nothing begin with blocks that are held by others, or kept."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] += 1
        begin = self.begin(sequence) + 2
        self.flat[begin : begin + len(blocks)] = blocks
        self._held[sequence] = len(blocks)

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
            raise self.full()
        for place in range(held, wanted):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            self.flat[self.begin(sequence) + 2 + place] = block
        self._held[sequence] = wanted

    def drop(self, sequence: int, length: int, slots: int) -> None:
        """Let the sequence, which had `length` positions, hold `slots` of them from now on, in its first blocks."""
        begin = self.begin(sequence)
        self.flat[begin + 1] = length - slots
        wanted = blocks_for(slots)
        for block in self.blocks(sequence)[wanted:]:
            self._holders[block] -= 1
            self._free.append(block)
        self._held[sequence] = wanted

    def dropped(self, sequence: int) -> int:
        """Return how many positions of its text the sequence does not hold any more."""
        return int(self.flat[self.begin(sequence) + 1])

    def full(self) -> InputError:
        """Say that there are too few blocks left."""
        return InputError(
            f"the cache is full: its {self.pool * BLOCK} positions are held by {sum(map(bool, self._held))} "
            "sequences; load the artifact with more `cache_tokens` or `cache_mb`, or fewer `sequences`"
        )

    def release(self, sequence: int) -> None:
        """Take back the sequence, with all that it holds and has reserved."""
        self._taken.discard(sequence)
        self.texts[sequence] += 1
        # From the end: without the blocks before it, a block is of no use to others, so it goes first.
        for block in reversed(self.blocks(sequence)):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self.index:
                    self._kept[block] = None
                else:
                    self._free.append(block)
        self._held[sequence] = self._reserved[sequence] = 0
        self.flat[self.begin(sequence) + 1] = 0

    def _evict(self) -> int:
        block = next(iter(self._kept))
        del self._kept[block]
        self.index.forget(block)
        return block

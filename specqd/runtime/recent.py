"""From where a sequence can go on whose older blocks are packed: what was rounded cannot be read as it was before."""

from __future__ import annotations

from specqd.errors import InputError
from specqd.manifest import BLOCK, Manifest, recent_blocks
from specqd.runtime.blocks import BlockTables

__all__ = ["RecentBlocks"]


class RecentBlocks:
    """For each sequence, and each cache that packs whole blocks: from which block on it is there in BF16.

    A position reads its own block in BF16, and so many `recent` positions before it. A text can be fed again from where
    these are still there, or from its begin, or, if there are none beside the block itself, from the begin of any
    block.
    """

    def __init__(self, manifest: Manifest, tables: BlockTables) -> None:
        self._tables = tables
        self._windows = {n: c.recent // BLOCK for n, c in manifest.caches.items() if c.recent is not None}
        self._of = {
            entry: [name for name in self._windows if f"{name}_k" in manifest.sizes("cache", entry)]
            for entry in dict.fromkeys(f.entry for f in manifest.functions)
        }
        # Of each cache and sequence: which text of it, and the first block of that.
        self._first: dict[tuple[str, int], tuple[int, int]] = {}

    @property
    def packs(self) -> bool:
        """Whether there is such a cache."""
        return bool(self._windows)

    @property
    def shares(self) -> bool:
        """Whether a sequence may begin with whole blocks of another: its first row reads no others in BF16."""
        return not any(self._windows.values())

    def forget(self, sequence: int) -> None:
        """Let a sequence be fed from anywhere next, whatever that reads: where only the time counts."""
        for name in self._windows:
            self._first.pop((name, sequence), None)

    def reached(self, entry: str, sequence: int, position: int) -> int:
        """Return the last position up to this one from which the entry can feed the sequence on."""
        for name in self._of[entry]:
            if self._from(name, sequence, position) is None:
                position = 0 if self._windows[name] else position // BLOCK * BLOCK
        return position

    def feed(self, entry: str, sequence: int, start: int, end: int) -> None:
        """Take note that positions from `start` to before `end` are fed.

        Raises:
            InputError: what the first of them reads in BF16 is not there any more.
        """
        for name in self._of[entry]:
            first = self._from(name, sequence, start)
            if first is None:
                raise InputError(
                    f"position {start} cannot be fed here: positions before it that it reads in BF16 have been packed "
                    f"in the cache {name}; feed again from position {self.reached(entry, sequence, start)} on"
                )
            kept = recent_blocks(self._windows[name] * BLOCK)
            first = max(first, (end - 1) // BLOCK - kept + 1)
            self._first[name, sequence] = self._tables.texts[sequence], first

    def _from(self, name: str, sequence: int, position: int) -> int | None:
        """Return the first block that is there in BF16 for who goes on at a position; None if one it needs is not."""
        window = self._windows[name]
        needed = max(0, position // BLOCK - window)
        text, first = self._first.get((name, sequence), (-1, 0))
        if text != self._tables.texts[sequence]:
            return needed
        if first <= needed:
            return first
        anew = position == 0 if window else position % BLOCK == 0
        return position // BLOCK if anew else None

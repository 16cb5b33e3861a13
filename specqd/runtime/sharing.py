"""Sharing: a sequence begins with the blocks of earlier ones whose text began alike, and leaves its own to later ones.

Whole blocks are shared and never written to by the target again; of one in which the texts part, the sequence gets a
copy, unless the cache packs whole blocks: what those are packed from is the other sequence's own. A block may have been
fed by the target alone: a draft with a cache of its own then feeds its part late, whoever holds the block. That is no
conflict, for they all write the same bits (see row invariance in docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Iterator

from specqd.manifest import BLOCK
from specqd.runtime.engine import Engine
from specqd.runtime.levels import Verifier
from specqd.runtime.prefix import Prefix, chain, digest

__all__ = ["Sharing"]


class Sharing:
    """What a sequence has in common with others of the engine.

    `target` is its chain of levels, whose figures of what is fed say what the caches hold.
    """

    def __init__(self, engine: Engine, target: Verifier, prompt: list[int]) -> None:
        self._engine, self._prompt = engine, prompt
        self._levels = list(_with_caches(target))
        # A level that works on the cache of another leaves drafts beyond what the other has fed. No one else may
        # see them, so what is shared has been fed by those who lend their caches.
        self._needed = {one.entry for one in self._levels if one is target or _lends(one)}
        # If several entries can write a cache, who did is part of what a block is.
        lineage = (one.entry for one in self._levels if engine.contested(one.entry))
        self._digests = chain(lineage, prompt)
        self._sequence = 0
        self._noted = [0] * len(self._levels)  # blocks whose text, as a level has fed it, is in the index

    def find(self) -> Prefix:
        """Find what is known of the prompt; its last token must be fed in any case, to learn what follows."""
        entries = [one.entry for one in self._levels]
        index, packs = self._engine.tables.index, self._engine.recent.packs
        return index.find(self._digests, self._prompt[:-1], entries, self._needed, whole_blocks=packs)

    def enter(self, sequence: int, positions: int) -> int | None:
        """Let the sequence, which holds nothing, begin with what is known, and set aside blocks for `positions`.

        Returns how many positions need not be fed; None if too few blocks are left, and then the sequence must be
        released.
        """
        prefix, tables = self.find(), self._engine.tables
        tables.share(sequence, prefix.blocks)
        if not tables.reserve(sequence, positions):
            return None
        if prefix.rest is not None:
            tables.hold(sequence, prefix.length)
            self._engine.memory.copy_block(prefix.rest, tables.blocks(sequence)[-1])
        for level in self._levels:
            level.fed = prefix.fed[level.entry]
        self._noted = [level.fed // BLOCK for level in self._levels]
        self._sequence = sequence
        return prefix.length

    def note(self, text: list[int], *, rest: bool = False) -> None:
        """Let others know the blocks of the text that were filled; with `rest`, the one that is not whole too."""
        certain = min(one.fed for one in self._levels if one.entry in self._needed)
        fed = [min(one.fed, certain) for one in self._levels]
        places = {
            place for noted, now in zip(self._noted, fed, strict=True) for place in range(noted, now // BLOCK)
        }
        if rest and certain % BLOCK and not self._engine.recent.packs:
            places.add(certain // BLOCK)
        tables = self._engine.tables
        for place in sorted(places):
            start = place * BLOCK
            tokens = text[start : min(start + BLOCK, certain)]
            of_block = {
                one.entry: min(max(now - start, 0), BLOCK) for one, now in zip(self._levels, fed, strict=True)
            }
            block = tables.block(self._sequence, place)
            tables.index.learn(block, self._digests[place], tokens, of_block)
            if place + 1 == len(self._digests) and len(tokens) == BLOCK:
                self._digests.append(digest(self._digests[place], tokens))
        self._noted = [now // BLOCK for now in fed]

    def awaits(self, other: Sharing) -> bool:
        """Whether the other sequence, once its prompt is fed, holds more whole blocks of this one's than are known."""
        most = (len(self._prompt) - 1) // BLOCK
        pairs = zip(self._digests[: most + 1], other._digests, strict=False)
        common = sum(1 for a, b in pairs if a == b) - 1
        return common > len(self.find().blocks)


def _with_caches(level: Verifier) -> Iterator[Verifier]:
    """Yield the levels that do not work on the cache of another, the target first."""
    if not level.shares:
        yield level
    for source in level.below:
        if isinstance(source.level, Verifier):
            yield from _with_caches(source.level)


def _lends(level: Verifier) -> bool:
    """Whether a level below works on its cache."""
    return any(isinstance(source.level, Verifier) and source.level.shares for source in level.below)

"""Prefix index: which blocks of the caches hold which text, so that a text that begins like another is not fed again.

A block is known by a SHA-256 chain: of its tokens, and of the digest of all before them (as vLLM's prefix caching).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from specqd.manifest import BLOCK

__all__ = ["Prefix", "PrefixIndex", "chain", "digest"]


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a text that ends with a block of tokens, given that of the text before."""
    return hashlib.sha256(before + array("i", tokens).tobytes()).digest()


def chain(lineage: Iterable[str], tokens: Sequence[int]) -> list[bytes]:
    """Return the digests of a text's beginnings: of none of it, of its first block, of two, to the last whole one.

    Equal texts of different lineages have nothing in common.
    """
    digests = [hashlib.sha256("\0".join(sorted(lineage)).encode()).digest()]
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        digests.append(digest(digests[-1], tokens[end - BLOCK : end]))
    return digests


@dataclass(frozen=True)
class Prefix:
    """The beginning of a text that is known, `length` positions of it.

    It is held by whole `blocks`, and after them by the first positions of the block `rest`. `fed` says how many
    positions of it the caches of each entry hold.
    """

    length: int
    blocks: tuple[int, ...]
    rest: int | None
    fed: Mapping[str, int]


@dataclass
class _Known:
    """The digest of the text before a block, its tokens so far, and how many of them each entry has fed."""

    before: bytes
    tokens: list[int]
    fed: dict[str, int] = field(default_factory=dict)

    def fed_by(self, entries: Iterable[str]) -> int:
        """Tokens that all of the entries have fed."""
        return min(self.fed.get(entry, 0) for entry in entries)

    def agreeing(self, tokens: Sequence[int]) -> int:
        """Tokens at the beginning that are these."""
        pairs = zip(self.tokens, tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.tokens), len(tokens)))


class PrefixIndex:
    """Blocks by the text that they hold. Who holds the blocks is not known here (see BlockTables)."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._whole: dict[bytes, int] = {}  # by digest of the text with the block
        self._after: dict[bytes, list[int]] = {}  # by digest of the text before the block

    def __contains__(self, block: int) -> bool:
        return block in self._known

    def find(
        self,
        digests: Sequence[bytes],
        tokens: Sequence[int],
        entries: Iterable[str],
        needed: Collection[str],
        *,
        whole_blocks: bool = False,
    ) -> Prefix:
        """Find the longest beginning of `tokens`, whose chain is `digests`, that all `needed` entries have fed.

        How far each of the `entries` has fed it is said too. `whole_blocks`: nothing counts that is less than one.
        """
        blocks: list[int] = []
        for after in digests[1 : len(tokens) // BLOCK + 1]:
            block = self._whole.get(after)
            if block is None or self._known[block].fed_by(needed) < BLOCK:
                break
            blocks.append(block)
        start = len(blocks) * BLOCK
        rest, most = None, 0
        for block in () if whole_blocks else self._after.get(digests[len(blocks)], ()):
            known = self._known[block]
            agreed = min(known.agreeing(tokens[start : start + BLOCK]), known.fed_by(needed))
            if agreed > most:
                rest, most = block, agreed
        parts = [(block, BLOCK) for block in blocks] + ([] if rest is None else [(rest, most)])
        fed = {entry: self._fed(entry, parts) for entry in entries}
        if whole_blocks:
            fed = {entry: count // BLOCK * BLOCK for entry, count in fed.items()}
        return Prefix(start + most, tuple(blocks), rest, fed)

    def _fed(self, entry: str, parts: Iterable[tuple[int, int]]) -> int:
        """Positions that an entry has fed without a gap of blocks of which so many count."""
        total = 0
        for block, most in parts:
            fed = min(self._known[block].fed.get(entry, 0), most)
            total += fed
            if fed < BLOCK:
                break
        return total

    def learn(self, block: int, before: bytes, tokens: list[int], fed: Mapping[str, int]) -> None:
        """Take note of the tokens that a block holds, after a text of digest `before`, and who has fed how many.

        A block that holds no more than another one is not taken note of.
        """
        known = self._known.get(block)
        if known is None:
            beside = self._after.setdefault(before, [])
            if any(self._known[other].tokens[: len(tokens)] == tokens for other in beside):
                return
            known = self._known[block] = _Known(before, tokens)
            beside.append(block)
        known.tokens = max(known.tokens, tokens, key=len)
        for entry, count in fed.items():
            known.fed[entry] = max(known.fed.get(entry, 0), count)
        if len(tokens) == BLOCK and self._whole.setdefault(digest(before, tokens), block) != block:
            self.forget(block)

    def forget(self, block: int) -> None:
        """Know nothing of a block any more."""
        known = self._known.pop(block)
        beside = self._after[known.before]
        beside.remove(block)
        if not beside:
            del self._after[known.before]
        if len(known.tokens) == BLOCK:
            after = digest(known.before, known.tokens)
            if self._whole[after] == block:
                del self._whole[after]

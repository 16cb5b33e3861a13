"""Draft from the text itself: what followed the same tokens earlier is likely to follow them again."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["SuffixLookup"]

_CANDIDATES = 32  # latest places that are compared, so that a text of one word costs no more than any other
_LONGEST = 32  # tokens compared: longer matches say no more


class SuffixLookup:
    """Finds the longest recent recurrence of the end of a text and proposes what followed it there.

    Places are indexed by the `shortest` tokens before them (Saxena, "Prompt Lookup Decoding", 2023); of those that
    match, the one that agrees with the end of the text for longest wins, the latest among equals. Memory grows by
    one entry a token, time by a constant.
    """

    def __init__(self, shortest: int = 3) -> None:
        self._shortest = shortest
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._keys: list[
            tuple[int, ...]
        ] = []  # of the places from `shortest` on, so that they can be taken back

    def propose(self, tokens: Sequence[int], want: int) -> list[int]:
        """Return `want` tokens that may follow `tokens`, or none when nothing recurs.

        Tokens must be those of the last call as far as both go, unless `keep` said otherwise.
        """
        size, shortest = len(tokens), self._shortest
        # The end itself is no earlier place, so it is indexed when it has a successor.
        for place in range(shortest + len(self._keys), size):
            key = tuple(tokens[place - shortest : place])
            self._keys.append(key)
            self._places.setdefault(key, []).append(place)
        if size < shortest or want < 1:
            return []
        best, longest = 0, 0
        for place in reversed(self._places.get(tuple(tokens[size - shortest :]), [])[-_CANDIDATES:]):
            agreed = shortest
            while agreed < min(_LONGEST, place) and tokens[place - 1 - agreed] == tokens[size - 1 - agreed]:
                agreed += 1
            if agreed > longest:
                best, longest = place, agreed
        if not longest:
            return []
        # A continuation that reaches the end of the text goes on with itself: loops stay loops.
        period = size - best
        return [tokens[best + i % period] for i in range(want)]

    def keep(self, length: int) -> None:
        """Forget the tokens from index `length` on."""
        while self._keys and self._shortest + len(self._keys) > length:
            places = self._places[self._keys.pop()]
            places.pop()

"""Lookups against a search that compares every place of the text."""

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specqd.runtime.lookup import SuffixLookup

FAR = 32  # tokens and places that are compared


def earlier_ends(text: Sequence[int], shortest: int) -> list[int]:
    """Where the longest suffix of the text that occurs earlier ended, latest first; none if it is too short."""
    for size in range(len(text) - 1, shortest - 1, -1):
        suffix = text[len(text) - size :]
        ends = [end for end in range(len(text) - 1, size - 1, -1) if text[end - size : end] == suffix]
        if ends:
            return ends
    return []


def goes_on(text: Sequence[int], end: int, want: int) -> list[int]:
    """What followed `end`, and what would follow it in a text that goes on alike."""
    whole = list(text)
    for _ in range(want):
        whole.append(whole[end + len(whole) - len(text)])
    return whole[len(text) :]


def expected(text: Sequence[int], want: int, shortest: int) -> list[int]:
    ends = earlier_ends(text, shortest)
    return goes_on(text, ends[0], want) if ends else []


@pytest.mark.parametrize("shortest", [1, 2, 3])
@pytest.mark.parametrize(("letters", "most"), [(2, 10), (3, 6)])
def test_every_short_text(shortest: int, letters: int, most: int) -> None:
    for size in range(most + 1):
        for letter in product(range(letters), repeat=size):
            text = list(letter)
            assert SuffixLookup(shortest).propose(text, 5) == expected(text, 5, shortest), text


@given(
    shortest=st.integers(1, 3),
    steps=st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 4)), max_size=12
    ),
)
def test_text_that_grows_and_is_retracted(shortest: int, steps: list[tuple[int, list[int], int]]) -> None:
    """Proposals are those of a search that never saw what was retracted; exact while nothing is too far."""
    lookup, text = SuffixLookup(shortest), list[int]()
    for cut, more, want in steps:
        keep = max(0, len(text) - cut)
        lookup.keep(keep)
        text = text[:keep] + more
        found = lookup.propose(text, want)
        assert found == SuffixLookup(shortest).propose(text, want)
        if len(text) <= FAR:
            assert found == expected(text, want, shortest)


@given(st.lists(st.integers(0, 1), min_size=FAR + 1, max_size=200), st.integers(1, 3))
def test_long_texts(text: list[int], shortest: int) -> None:
    """Of the latest places, the first with the longest agreement up to a limit."""
    suffix = text[len(text) - shortest :]
    places = [end for end in range(len(text) - 1, shortest - 1, -1) if text[end - shortest : end] == suffix][
        :FAR
    ]
    agreed = [next((n for n in range(end) if text[end - 1 - n] != text[-1 - n]), end) for end in places]
    best = [end for end, n in zip(places, agreed, strict=True) if min(n, FAR) == min(max(agreed), FAR)]
    assert SuffixLookup(shortest).propose(text, 4) == (goes_on(text, best[0], 4) if best else [])


def test_loop_is_continued() -> None:
    assert SuffixLookup(3).propose([9, 8, *[1, 2, 3] * 40, 1], 7) == [2, 3, 1, 2, 3, 1, 2]


def test_nothing_wanted_or_found() -> None:
    lookup = SuffixLookup(2)
    assert lookup.propose([], 4) == []
    assert lookup.propose(list(range(100)), 4) == []
    lookup.keep(0)
    assert lookup.propose([1, 2, 3, 4, 1, 2, 3], 0) == []


@pytest.mark.parametrize("text", [[0] * 3000, [0, 1, 2] * 1000, [n * n % 7 for n in range(3000)]])
def test_memory_grows_by_one_place_a_token(text: list[int]) -> None:
    lookup = SuffixLookup()
    lookup.propose(text, 1)
    assert sum(map(len, lookup._places.values())) == len(lookup._keys) == len(text) - 3
    lookup.keep(0)
    assert not any(lookup._places.values()) and not lookup._keys

"""Lookups against a search that compares every place of the text."""

from collections.abc import Callable, Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specqd.runtime.lookup import PromptLookup, SuffixLookup

Lookup = PromptLookup | SuffixLookup
LONG = 10**6


def earlier_ends(text: Sequence[int], longest: int, shortest: int) -> list[int]:
    """Where the longest suffix that occurs earlier, of `shortest` to `longest` tokens, ended, latest first."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
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


def expected(text: Sequence[int], want: int, longest: int, shortest: int) -> list[int]:
    ends = earlier_ends(text, longest, shortest)
    return goes_on(text, ends[0], want) if ends else []


# Each maker with the longest and shortest suffix it looks for.
MAKERS = [
    pytest.param(lambda: PromptLookup(longest=3, shortest=2), 3, 2, id="lookup-2-3"),
    pytest.param(lambda: PromptLookup(longest=1, shortest=1), 1, 1, id="lookup-1"),
    pytest.param(lambda: PromptLookup(longest=2, shortest=3), 3, 3, id="lookup-3"),
    pytest.param(lambda: SuffixLookup(shortest=1), LONG, 1, id="suffix-1"),
    pytest.param(lambda: SuffixLookup(shortest=3), LONG, 3, id="suffix-3"),
]
every_lookup = pytest.mark.parametrize(("make", "longest", "shortest"), MAKERS)


@every_lookup
@pytest.mark.parametrize(("letters", "most"), [(2, 10), (3, 6)])
def test_every_short_text(
    make: Callable[[], Lookup], longest: int, shortest: int, letters: int, most: int
) -> None:
    for size in range(most + 1):
        for letter in product(range(letters), repeat=size):
            text = list(letter)
            assert make().propose(text, 5) == expected(text, 5, longest, shortest), text


@every_lookup
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 4)), max_size=12
    )
)
def test_text_that_grows_and_is_retracted(
    make: Callable[[], Lookup], longest: int, shortest: int, steps: list[tuple[int, list[int], int]]
) -> None:
    lookup, text = make(), list[int]()
    for cut, more, want in steps:
        keep = max(0, len(text) - cut)
        lookup.keep(keep)
        text = text[:keep] + more
        fresh = make()
        assert lookup.propose(text, want) == fresh.propose(text, want)
        assert vars(lookup) == vars(fresh)
        # Suffix links are at most as many as tokens, so none goes unnoticed up to the automaton's limit.
        if len(text) <= SuffixLookup._DEEPEST:
            assert lookup.propose(text, want) == expected(text, want, longest, shortest)


@given(st.lists(st.integers(0, 1), min_size=33, max_size=200), st.integers(1, 3))
def test_longest_suffix_of_long_texts(text: list[int], shortest: int) -> None:
    choices = [goes_on(text, end, 4) for end in earlier_ends(text, LONG, shortest)] or [[]]
    assert SuffixLookup(shortest).propose(text, 4) in choices


@every_lookup
def test_loop_is_continued(make: Callable[[], Lookup], longest: int, shortest: int) -> None:
    text = [9, 8, *[1, 2, 3] * 40, 1]
    assert make().propose(text, 7) == [2, 3, 1, 2, 3, 1, 2]


@every_lookup
def test_nothing_wanted_or_found(make: Callable[[], Lookup], longest: int, shortest: int) -> None:
    lookup = make()
    assert lookup.propose([], 4) == []
    assert lookup.propose(list(range(100)), 4) == []
    assert lookup.propose([1, 2, 3, 4, 1, 2, 3], 0) == []


def test_shorter_text_needs_no_keep() -> None:
    lookup = SuffixLookup(2)
    lookup.propose([1, 2, 3, 1, 2], 1)
    assert lookup.propose([1, 2, 3], 1) == []


@pytest.mark.parametrize("text", [[0] * 3000, [0, 1, 2] * 1000, [n * n % 7 for n in range(3000)]])
def test_work_and_memory_grow_with_the_text_only(text: list[int]) -> None:
    lookup = SuffixLookup()
    lookup.propose(text, 1)
    assert len(lookup._link) <= 2 * len(text)
    assert sum(map(len, lookup._next)) <= 3 * len(text)
    assert sum(len(added.passed) for added in lookup._log) <= SuffixLookup._DEEPEST * len(text)

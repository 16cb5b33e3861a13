"""Choosers on every path of chance and every draft: tokens are distributed as the rows say, penalties included."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from test_acceptance import Language, Law, law, own

from specqd.runtime.acceptance import Chance
from specqd.runtime.choosing import Choice, Chooser, Coupled, Greedy, Rejecting, chooser
from specqd.runtime.output import Output
from specqd.runtime.sampling import Sampling


class Exact:
    """In place of Sampling: exact distributions that depend on the whole text, as with a penalty."""

    looks_back, seed = True, None

    def __init__(self, languages: list[Language]) -> None:
        self._languages = languages

    def distribution(self, row: tuple[int, int], history: tuple[int, ...]) -> np.ndarray:
        level, at = row
        assert at == len(history)
        return self._languages[level].after(tuple(history))


class Rows:
    """In place of Output: row `first + i` belongs to the text of length `length + i`."""

    def __init__(self, level: int, first: int, length: int) -> None:
        self._level, self._ahead = level, length - first

    def row(self, row: int) -> tuple[int, int]:
        return self._level, row + self._ahead


def round_of(level: int, levels: int, verifier: Chooser, text: list[int], length: int) -> list[Choice]:
    """What one pass of a level makes certain, with `length` drafts or a few more from the level below."""
    drafts: list[Choice] = []
    while level + 1 < levels and len(drafts) < length:
        drafts += round_of(level + 1, levels, verifier, [*text, *(one.token for one in drafts)], length)
    first = 2  # rows of tokens that were pending
    return verifier.verify(Rows(level, first, len(text)), first, text, drafts)


@pytest.mark.parametrize(
    ("vocabulary", "levels", "length", "tokens"), [(2, 2, 1, 3), (2, 2, 2, 3), (3, 2, 2, 2), (2, 3, 1, 2)]
)
def test_rejection_in_exact_numbers(vocabulary: int, levels: int, length: int, tokens: int):
    languages = [Language(vocabulary, seed) for seed in range(levels)]

    def run(chance: Chance) -> tuple[int, ...]:
        verifier = Rejecting(Exact(languages))
        verifier._chance = chance
        text: list[int] = []
        while len(text) < tokens:
            new = round_of(0, levels, verifier, text, length)
            for one in new:
                assert one.distribution is languages[0].after(tuple(text))
                text.append(one.token)
        return tuple(text[:tokens])

    found: Law = law(run)
    assert found == own(languages[0], vocabulary, tokens)
    assert sum(found.values()) == Fraction(1)


def output(rows: int, seed: int) -> Output:
    logits = np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)
    return Output(logits.argmax(-1), logits, None, 4)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=3), Sampling(0.5, 3, repetition_penalty=1.9, seed=4)]
)
@pytest.mark.parametrize("drafts", list(product(range(4), repeat=2)))
def test_noise_keeps_what_plain_decoding_picks(sampling: Sampling, drafts: tuple[int, ...]):
    """Every pair of drafts; plain decoding gets one row at a time."""
    for seed in range(10):
        text, rows = [1, 2], output(5, seed)
        verifier = Coupled(sampling)
        plain = list(text)
        for i in range(3):
            plain.append(verifier.verify(rows, 2 + i, plain, ())[0].token)
            if i < 2 and plain[-1] != drafts[i]:
                break
        new = verifier.verify(rows, 2, text, [Choice(token) for token in drafts])
        assert [one.token for one in new] == plain[2:]
        assert text == [1, 2]


def test_which_chooser_serves_which_request():
    assert isinstance(chooser(None), Greedy)
    assert isinstance(chooser(Sampling(0, seed=1)), Greedy)
    assert isinstance(chooser(Sampling(0, repetition_penalty=1.1)), Coupled)
    assert isinstance(chooser(Sampling(1)), Coupled)
    assert isinstance(chooser(replace(Sampling(1), coupling="rejection")), Rejecting)

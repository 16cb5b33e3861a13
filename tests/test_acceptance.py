"""Rejection sampling: every path of accepting and rejecting, with exact probabilities, against the target's own."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from specqd.errors import InputError
from specqd.runtime.acceptance import Chance, Stream, rejection
from specqd.runtime.sampling import Sampling

Law = dict[tuple[int, ...], Fraction]


class Script:
    """Takes the branches it is told, then the first of each; notes how many there were and how likely the path."""

    def __init__(self, told: Sequence[int]) -> None:
        self.told, self.taken, self.ways = list(told), list[int](), list[int]()
        self.probability = Fraction(1)

    def branch(self, options: list[tuple[int, Fraction]]) -> int:
        options = [(value, p) for value, p in options if p]
        assert sum(p for _, p in options) == 1
        chosen = self.told[len(self.taken)] if len(self.taken) < len(self.told) else 0
        self.taken.append(chosen)
        self.ways.append(len(options))
        value, p = options[chosen]
        self.probability *= p
        return value

    def accepts(self, p: Fraction, q: Fraction) -> bool:
        yes = min(Fraction(1), Fraction(p) / q)
        return bool(self.branch([(1, yes), (0, 1 - yes)]))

    def draw(self, weights: np.ndarray) -> int:
        total = sum(weights)
        return self.branch([(i, w / total) for i, w in enumerate(weights)])


def law(run: Callable[[Chance], tuple[int, ...]]) -> Law:
    """The exact distribution of what `run` returns."""
    found: Law = defaultdict(Fraction)
    told: list[int] | None = []
    while told is not None:
        script = Script(told)
        found[run(script)] += script.probability
        told = following(script)
    assert sum(found.values()) == 1
    return dict(found)


def following(script: Script) -> list[int] | None:
    """The next path in order; None after the last."""
    for at in reversed(range(len(script.taken))):
        if script.taken[at] + 1 < script.ways[at]:
            return [*script.taken[:at], script.taken[at] + 1]
    return None


class Language:
    """A distribution over `vocabulary` tokens after each text, in small exact numbers, some of them 0."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary, self._rng = vocabulary, np.random.default_rng(seed)
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def after(self, text: tuple[int, ...]) -> np.ndarray:
        if text not in self._known:
            weights = [Fraction(int(n)) for n in self._rng.integers(0, 4, self._vocabulary)]
            weights[int(self._rng.integers(self._vocabulary))] += 1
            self._known[text] = np.array([w / sum(weights) for w in weights], object)
        return self._known[text]


class Certain(Language):
    """Proposes one token, as a lookup or a greedy draft does."""

    def after(self, text: tuple[int, ...]) -> None:
        return None

    def token(self, text: tuple[int, ...]) -> int:
        return sum((i + 1) * token for i, token in enumerate(text)) % self._vocabulary


def propose(
    chain: Sequence[Language], lengths: Sequence[int], text: tuple[int, ...], want: int, chance: Chance
) -> list[int]:
    """`want` tokens or a few more, as level 0 of the chain emits them with the help of those below it."""
    new: list[int] = []
    while len(new) < want:
        now = (*text, *new)
        if isinstance(chain[0], Certain):
            new.append(chain[0].token(now))
        elif len(chain) == 1:
            new.append(chance.draw(chain[0].after(now)))
        else:
            drafts = propose(chain[1:], lengths[1:], now, lengths[0], chance)
            q = [chain[1].after((*now, *drafts[:i])) for i in range(len(drafts))]
            new += rejection(drafts, q, rows(chain[0], now, drafts), chance)
    return new


def rows(language: Language, text: tuple[int, ...], drafts: Sequence[int]) -> Iterator[np.ndarray]:
    return (language.after((*text, *drafts[:i])) for i in range(len(drafts) + 1))


def own(language: Language, vocabulary: int, length: int) -> Law:
    """What a language says by itself."""
    found: Law = {}
    for text in product(range(vocabulary), repeat=length):
        p = Fraction(1)
        for i, token in enumerate(text):
            p *= language.after(text[:i])[token]
        if p:
            found[text] = p
    return found


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.extended) for seed in range(2, 4))]
)
@pytest.mark.parametrize("draft", [Language, Certain])
@pytest.mark.parametrize(
    ("vocabulary", "length", "tokens"),
    [
        *((2, 1, 2), (2, 2, 3), (2, 3, 4), (3, 1, 2), (3, 2, 3), (3, 3, 3), (4, 1, 2), (4, 2, 3), (4, 3, 2)),
        pytest.param(3, 3, 4, marks=pytest.mark.extended),
    ],
)
def test_two_levels(vocabulary: int, length: int, tokens: int, draft: type[Language], seed: int) -> None:
    """Mostly one token more than is drafted, so that whatever may come after a round is seen too."""
    chain = [Language(vocabulary, seed), draft(vocabulary, 100 + seed)]

    def run(chance: Chance) -> tuple[int, ...]:
        return tuple(propose(chain, [length], (), tokens, chance)[:tokens])

    assert law(run) == own(chain[0], vocabulary, tokens)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draft", [Language, Certain])
@pytest.mark.parametrize(
    ("vocabulary", "lengths", "tokens"),
    [(2, (1, 1), 3), (2, (2, 1), 3), (2, (1, 2), 3), (2, (2, 2), 2), (3, (1, 1), 2), (3, (2, 1), 2)],
)
def test_three_levels(
    vocabulary: int, lengths: tuple[int, ...], tokens: int, draft: type[Language], seed: int
) -> None:
    chain = [Language(vocabulary, seed), Language(vocabulary, 100 + seed), draft(vocabulary, 200 + seed)]

    def run(chance: Chance) -> tuple[int, ...]:
        return tuple(propose(chain, lengths, (), tokens, chance)[:tokens])

    assert law(run) == own(chain[0], vocabulary, tokens)


def test_four_levels() -> None:
    chain = [Language(2, 0), Language(2, 1), Language(2, 2), Certain(2, 3)]

    def run(chance: Chance) -> tuple[int, ...]:
        return tuple(propose(chain, (1, 1, 1), (), 2, chance)[:2])

    assert law(run) == own(chain[0], 2, 2)


def exact(*weights: int) -> np.ndarray:
    return np.array([Fraction(w, sum(weights)) for w in weights], object)


@pytest.mark.parametrize(
    ("p", "q", "accepted"),
    [
        pytest.param(exact(1, 2, 3), exact(1, 2, 3), Fraction(1), id="equal"),
        pytest.param(exact(1, 1, 0, 0), exact(0, 0, 1, 3), Fraction(0), id="nothing in common"),
        pytest.param(exact(0, 1, 0), exact(0, 1, 0), Fraction(1), id="both certain"),
        pytest.param(exact(1, 3), exact(3, 1), Fraction(1, 2), id="overlap"),
    ],
)
def test_share_that_stands_is_the_overlap(p: np.ndarray, q: np.ndarray, accepted: Fraction) -> None:
    """The sum of min(p, q): no rule accepts more (Leviathan et al. 2023, theorem 3.5)."""

    def run(chance: Chance) -> tuple[int, ...]:
        return (len(rejection([chance.draw(q)], [q], [p, p], chance)) - 1,)

    assert law(run).get((1,), 0) == accepted


def test_rows_are_read_as_they_are_needed() -> None:
    def p() -> Iterator[np.ndarray]:
        yield np.array([0.0, 1.0])
        raise AssertionError("read on after a rejection")

    assert rejection([0, 0], [None, None], p(), Stream(0)) == [1]


class Never(Stream):
    """Rejects what even a certain token may lose by rounding."""

    def accepts(self, p: float, q: float) -> bool:
        return False


@pytest.mark.parametrize("q", [None, np.array([0.0, 1.0])])
def test_rounding_that_leaves_nothing_falls_back_to_the_verifier(q: np.ndarray | None) -> None:
    p = np.array([0.0, 1 - 1e-16])
    assert rejection([1], [q], [p, p], Never(0)) == [1]


@pytest.mark.parametrize("q", [None, np.array([0.5, 0.5])])
def test_broken_distributions_are_refused(q: np.ndarray | None) -> None:
    with pytest.raises(InputError, match="cannot sample: the probabilities sum to nan"):
        rejection([0], [q], [np.full(2, np.nan)] * 2, Stream(0))
    with pytest.raises(InputError, match=r"cannot sample: the probabilities sum to 0\.0"):
        rejection([], [], [np.zeros(2)], Stream(0))


def test_stream_decides_as_often_as_asked() -> None:
    """Four standard deviations of 20,000 tries; what has no weight is never drawn."""
    stream = Stream(5)
    weights = np.array([0.0, 3.0, 0.0, 1.0, 0.0])
    drawn = Counter(stream.draw(weights) for _ in range(20000))
    assert set(drawn) == {1, 3} and abs(drawn[3] / 20000 - 0.25) < 4 * (0.1875 / 20000) ** 0.5
    accepted = sum(stream.accepts(0.1, 0.4) for _ in range(20000))
    assert abs(accepted / 20000 - 0.25) < 4 * (0.1875 / 20000) ** 0.5
    assert all(stream.accepts(0.4, 0.4) and stream.accepts(1.0, 1) for _ in range(1000))
    assert not any(stream.accepts(0.0, 0.4) for _ in range(1000))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
def test_stream_draws_over_blocks(size: int) -> None:
    """5000 draws in at most 7 cells; 6 degrees of freedom exceed 27.9 once in 10,000 times."""
    stream, weights = Stream(size), np.zeros(size)
    places = sorted(
        {0, size // 3, size // 2, size - 2, size - 1, min(255, size - 1), min(256, size - 1)} - {-1}
    )
    weights[places] = np.arange(1, len(places) + 1)
    drawn = Counter(stream.draw(weights) for _ in range(5000))
    assert drawn.keys() <= set(places)
    expected = 5000 * weights[places] / weights.sum()
    assert sum((drawn[at] - mean) ** 2 / mean for at, mean in zip(places, expected, strict=True)) < 27.9


def test_stream_repeats_by_seed() -> None:
    weights = np.ones(1000)
    runs = [[stream.draw(weights) for _ in range(5)] for stream in map(Stream, (3, 3, 4, None))]
    assert runs[0] == runs[1] and runs[0] != runs[2] and runs[0] != runs[3]


def test_sampled_drafts_in_floats() -> None:
    """Chi-square of 20,000 rounds with real distributions; 7 degrees of freedom exceed 29.9 once in 10,000 times."""
    rng, stream = np.random.default_rng(0), Stream(1)
    p, q = (
        Sampling(0.8, top_k=8, top_p=0.97).distribution(rng.standard_normal(40).astype(np.float32) * s)
        for s in (1, 2)
    )
    counts = Counter(rejection([stream.draw(q)], [q], [p, p], stream)[0] for _ in range(20000))
    assert set(counts) <= set(np.flatnonzero(p))
    assert sum((counts[i] - 20000 * p[i]) ** 2 / (20000 * p[i]) for i in np.flatnonzero(p)) < 29.9

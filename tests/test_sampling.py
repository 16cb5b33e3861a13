"""Distributions against transformers' own processors; noise against integers of any size and expected counts."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from specqd.errors import InputError
from specqd.runtime.sampling import Noise, Sampling


def transformers_distribution(sampling: Sampling, logits: np.ndarray, history: list[int]) -> np.ndarray:
    """In float64, so that the only rounding compared is ours."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    text = torch.tensor([history], dtype=torch.int64)
    steps = []
    if sampling.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(logits_process.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        scores = step(text, scores)
    return torch.softmax(scores, -1)[0].numpy()


def rows(vocabulary: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(vocabulary)
    usual = (4 * rng.standard_normal(vocabulary)).astype(np.float32)
    holes = usual.copy()
    holes[rng.random(vocabulary) < 0.6] = -np.inf
    holes[0] = 1.0
    alone = np.full(vocabulary, -np.inf, np.float32)
    alone[vocabulary // 2] = -3.0
    return {
        "usual": usual,
        "peaked": usual * 10,
        "flat": usual / 100,
        "ties": np.round(usual / 2) * 2,
        "holes": holes,
        "equal": np.full(vocabulary, 2.5, np.float32),
        "alone": alone,
    }


# No border falls on a sum of equal probabilities, where rounding decides.
GRID = [
    Sampling(temperature, top_k, top_p, min_p, penalty)
    for temperature, top_k, top_p, min_p, penalty in product(
        (1.0, 0.7, 1.9), (0, 1, 5, 1000), (1.0, 0.9137, 0.3141, 1e-6), (0.0, 0.0321, 1.0), (1.0, 1.3, 0.8)
    )
]


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 100, 3001])
@pytest.mark.parametrize("name", ["usual", "peaked", "flat", "ties", "holes", "equal", "alone"])
def test_transformers_distribution(name: str, vocabulary: int) -> None:
    """Which of equal tokens stay is not defined there, so probabilities are compared by size.

    Logits are float32 to 2^-24 of some 400, divided by 0.7: each is right to 4e-5 of a logit.
    """
    logits = rows(vocabulary)[name]
    history = [0, vocabulary // 2, vocabulary - 1, 0]
    for sampling in GRID:
        ours = sampling.distribution(logits, history)
        theirs = transformers_distribution(sampling, logits, history)
        assert ours.dtype == np.float64 and ours.shape == logits.shape
        assert ours.sum() == pytest.approx(1, abs=1e-12)
        assert np.count_nonzero(ours > 1e-30) == np.count_nonzero(theirs > 1e-30), sampling
        np.testing.assert_allclose(
            np.sort(ours), np.sort(theirs), rtol=5e-5, atol=1e-30, err_msg=str(sampling)
        )
        if name in ("usual", "peaked", "flat", "holes"):
            np.testing.assert_allclose(ours, theirs, rtol=5e-5, atol=1e-30, err_msg=str(sampling))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1e3, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.array([1.0, 3.0, -np.inf, 3.0, 2.0], np.float32)
    expected = [0, 0.5, 0, 0.5, 0] if temperature < 1 else [0.25, 0.25, 0, 0.25, 0.25]
    np.testing.assert_allclose(Sampling(temperature).distribution(logits), expected, atol=1e-3)


def test_of_equal_tokens_the_last_stay() -> None:
    logits = np.zeros(4, np.float32)
    assert Sampling(top_p=0.5).distribution(logits).tolist() == [0, 0, 0.5, 0.5]
    assert Sampling(top_k=2).distribution(logits).tolist() == [0.25] * 4


def test_temperature_0_is_greedy() -> None:
    logits = np.array([1.0, 3.0, 3.0, -np.inf], np.float32)
    assert Sampling(0).greedy and not Sampling(0.1).greedy
    assert Sampling(0).distribution(logits).tolist() == [0, 1, 0, 0]
    assert Sampling(0, repetition_penalty=2).distribution(logits, [1]).tolist() == [0, 0, 1, 0]


def test_logits_stay_as_they_were() -> None:
    logits = rows(100)["usual"]
    before = logits.copy()
    Sampling(0.5, 10, 0.9, 0.01, 1.2).distribution(logits, [1, 2, 3])
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0), Sampling(1, 2, 0.9, 0.1, 1.1)])
def test_broken_logits_are_refused(sampling: Sampling, bad: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(InputError, match=f"cannot sample from logits whose largest is {bad}"):
        sampling.distribution(logits, [0])
    with pytest.raises(InputError, match="cannot sample from logits whose largest is -inf"):
        sampling.distribution(np.full(3, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "values", "asked"),
    [
        ("temperature", [-0.1, math.inf, math.nan, "1", None], "a number of 0 or more"),
        ("top_k", [-1, 1.5, math.inf, None], "a whole number of 0 or more; 0 keeps all tokens"),
        ("top_p", [0, -0.5, 1.01, math.nan], "a number above 0 and up to 1; 1 keeps all tokens"),
        ("min_p", [-0.1, 1.1, math.nan], "a number from 0 to 1; 0 keeps all tokens"),
        ("repetition_penalty", [0, -1, math.inf], "a number above 0; 1 penalises nothing"),
        ("seed", [-1, 2**64, 0.5], "a whole number from 0 to 2^64 - 1, or none"),
    ],
)
def test_impossible_values_are_refused(name: str, values: list[object], asked: str) -> None:
    for value in values:
        with pytest.raises(InputError) as raised:
            Sampling(**{name: value})
        assert str(raised.value) == f"cannot sample with {name} = {value!r}: give {asked}"


def split_mix(state: int, count: int) -> list[int]:
    """SplitMix64 as published (Steele, Lea and Flood 2014)."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def gumbel_pick(seed: int, position: int, distribution: np.ndarray) -> int:
    """The argmax of log p + g; tokens rarer than 2^-14 compete as one before they do among themselves."""
    begin = split_mix(seed, 1)[0]
    begin = split_mix((begin + position * 0x9E3779B97F4A7C15) % 2**64, 1)[0]
    first = (begin - 0x9E3779B97F4A7C15) % 2**64  # so that number 0 comes first
    numbers = [(2 * (number >> 12) + 1) / 2**53 for number in split_mix(first, len(distribution) + 1)]

    def score(p: float, u: float) -> float:
        return math.log(p) - math.log(-math.log1p(-u))

    scores = {i: score(p, numbers[i + 1]) for i, p in enumerate(distribution) if p}
    rare = [i for i in scores if distribution[i] <= 2**-14]
    likely = [i for i in scores if distribution[i] > 2**-14]
    best = max(likely, key=scores.__getitem__, default=None)
    if rare:
        together = score(sum(distribution[i] for i in rare), numbers[0])
        if best is None or together > scores[best]:
            return max(rare, key=scores.__getitem__)
    assert best is not None
    return best


def test_split_mix_is_the_published_one() -> None:
    """The widely quoted numbers for the seed 1234567."""
    assert split_mix(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_pick_is_the_argmax_with_gumbel_noise(seed: int) -> None:
    noise, rng = Noise(seed), np.random.default_rng(seed % 1000)
    for position in range(100):
        distribution = rng.dirichlet(np.full(50, 0.1 + position % 3)) * (rng.random(50) < 0.7)
        distribution /= distribution.sum()
        assert noise.pick(distribution, position) == gumbel_pick(seed, position, distribution)


@pytest.mark.parametrize("size", [20000, 16384, 16383])
def test_rare_tokens_compete_as_one_first(size: int) -> None:
    """All are rare, all but by a rounding, or none."""
    for distribution in (np.full(size, 1 / size), np.r_[0.6, np.full(size - 1, 0.4 / (size - 1))]):
        for position in range(20):
            assert Noise(5).pick(distribution, position) == gumbel_pick(5, position, distribution)


P = np.array([0.5, 0.25, 0.0, 0.2, 0.05])


def chi_square(counts: Counter, expected: dict) -> float:
    assert set(counts) <= set(expected)
    total = counts.total()
    return sum((counts[key] - total * p) ** 2 / (total * p) for key, p in expected.items())


def test_picks_are_distributed_as_asked() -> None:
    """By position and by seed; 3 degrees of freedom exceed 21.1 once in 10,000 times."""
    expected = {i: p for i, p in enumerate(P) if p}
    noise = Noise(7)
    assert chi_square(Counter(noise.pick(P, position) for position in range(10000)), expected) < 21.1
    assert chi_square(Counter(Noise(seed).pick(P, 3) for seed in range(10000)), expected) < 21.1


def test_rare_tokens_are_picked_as_often_as_asked() -> None:
    """8 groups of 8192 rare tokens beside a likely one; 8 degrees of freedom exceed 31.8 once in 10,000 times."""
    shares = np.array([0.5, *(0.5 * weight / 36 for weight in range(1, 9))])
    distribution = np.r_[shares[0], np.repeat(shares[1:] / 8192, 8192)]
    noise = Noise(13)
    picks = Counter((noise.pick(distribution, i) + 8191) // 8192 for i in range(2000))
    assert chi_square(picks, dict(enumerate(shares))) < 31.8


def test_neighbouring_picks_are_independent() -> None:
    """Next positions and next seeds; 15 degrees of freedom exceed 44.3 once in 10,000 times."""
    expected = {(i, j): p * q for i, p in enumerate(P) for j, q in enumerate(P) if p * q}
    noise = Noise(11)
    positions = Counter((noise.pick(P, 2 * i), noise.pick(P, 2 * i + 1)) for i in range(5000))
    seeds = Counter((Noise(2 * i).pick(P, 0), Noise(2 * i + 1).pick(P, 0)) for i in range(5000))
    assert chi_square(positions, expected) < 44.3
    assert chi_square(seeds, expected) < 44.3


def test_near_distributions_mostly_pick_the_same() -> None:
    """At least (1 - d) / (1 + d) of the time at a total variation d (Daliri et al. 2024); 3 sigma of 5000 picks."""
    other = np.array([0.45, 0.3, 0.05, 0.15, 0.05])
    distance, noise = np.abs(P - other).sum() / 2, Noise(3)
    same = np.mean([noise.pick(P, i) == noise.pick(other, i) for i in range(5000)])
    assert same > (1 - distance) / (1 + distance) - 0.02


def test_seed_repeats_and_none_differs() -> None:
    def picks(noise: Noise) -> list[int]:
        return [noise.pick(np.full(1000, 1e-3), i) for i in range(8)]

    assert picks(Noise(4)) == picks(Noise(4)) != picks(Noise(5))
    assert picks(Noise(None)) != picks(Noise(None))

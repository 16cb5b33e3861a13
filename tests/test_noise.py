"""The noise that picks tokens: the published numbers, the argmax with Gumbel noise, and how often tokens come."""

import math
from collections import Counter

import numpy as np
import pytest

from specqd.runtime.noise import Noise


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

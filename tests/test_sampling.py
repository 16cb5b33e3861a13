"""Distributions against transformers' own processors; noise against integers of any size and expected counts."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from specqd.errors import InputError
from specqd.runtime.sampling import Sampling


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

"""Sampling by a compiled model: the same text whatever is drafted, the target's distribution, and scores."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specqd.errors import InputError
from specqd.runtime.asking import Round
from specqd.runtime.model import Model, load
from specqd.runtime.sampling import Sampling

pytest_plugins = ["drafted_artifact"]

PROMPT = [11, 12, 11, 30, 12, 11]
PLANS = [
    "target <- draft@fixed:1",
    "target <- draft@fixed:3",
    "target <- suffix:1@fixed:3 | draft@adaptive",
    "target <- draft@entropy <- suffix:1@fixed:2",
]
SETTINGS = [
    Sampling(0.8),
    Sampling(1.0, top_k=5),
    Sampling(1.3, top_p=0.9),
    Sampling(0.7, min_p=0.05),
    Sampling(0.9, 20, 0.95, 0.01, 1.3),
    Sampling(0, repetition_penalty=1.5),
    Sampling(0.3, repetition_penalty=0.8),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"{s.temperature}-{s.repetition_penalty}")
def test_a_seed_gives_the_same_text_whatever_is_drafted(drafted: Model, sampling: Sampling):
    accepted = 0
    for seed in range(4):
        one = replace(sampling, seed=seed)
        plain = drafted.generate(PROMPT, 40, sampling=one, speculate=False, ignore_eos=True)
        for plan in PLANS:
            made = drafted.generate(PROMPT, 40, sampling=one, plan=plan, ignore_eos=True)
            assert made.tokens == plain.tokens
            accepted += made.stats.accepted
    assert accepted > 40


def test_seeds_differ_and_none_is_new_each_time(drafted: Model):
    def text(seed: int | None, coupling: str) -> tuple[int, ...]:
        how = Sampling(1.0, seed=seed, coupling=coupling)
        return tuple(drafted.generate(PROMPT, 12, sampling=how, ignore_eos=True).tokens)

    for coupling in ("noise", "rejection"):
        assert len({text(seed, coupling) for seed in range(20)}) == 20
        assert len({text(None, coupling) for _ in range(20)}) == 20
        # The plan drafts the same number each round, so a seed repeats rejection too.
        assert text(4, coupling) == text(4, coupling)


def test_the_penalty_alone_is_greedy_over_penalised_logits(drafted: Model):
    how = Sampling(0, repetition_penalty=1.7)
    made = drafted.generate(PROMPT, 30, sampling=how, ignore_eos=True)
    text = list(PROMPT)
    for token in made.tokens:
        p = how.distribution(plain_logits(drafted, text), text)
        assert token == p.argmax()
        text.append(token)
    assert made.tokens != drafted.generate(PROMPT, 30, ignore_eos=True).tokens
    same = drafted.generate(PROMPT, 30, sampling=Sampling(0), ignore_eos=True)
    assert same.tokens == drafted.generate(PROMPT, 30, ignore_eos=True).tokens


def plain_logits(model: Model, text: list[int]) -> np.ndarray:
    for at, token in enumerate(text):
        output = model.engine.feed("target", [token], at)
    return output.row(0).copy()


@pytest.mark.parametrize("plan", ["target", PLANS[1], PLANS[2].replace("adaptive", "fixed:3")])
@pytest.mark.parametrize("coupling", ["noise", "rejection"])
def test_text_is_distributed_as_the_target_says(drafted: Model, coupling: str, plan: str):
    """Chi-square of 3000 texts of 3 tokens, against products of the target's own probabilities.

    The first comes of the prefill, the others of a round with drafts. Texts expected fewer than 5 times count as one.
    The seeds are fixed, so the figure is too; it would be beyond the bound for one set of seeds in 10,000 (by
    Wilson and Hilferty's normal approximation of the cube root).
    """
    how, count = Sampling(1.1, top_k=4, repetition_penalty=1.2), 3000
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for text, probability in expected.items():
            before = [*PROMPT, *text]
            p = how.distribution(plain_logits(drafted, before), before)
            longer |= {(*text, int(i)): probability * p[i] for i in np.flatnonzero(p)}
        expected = longer
    found = Counter[tuple[int, ...]]()
    for seed in range(count):
        one = replace(how, seed=seed, coupling=coupling)
        made = drafted.generate(PROMPT, 4, sampling=one, plan=plan, ignore_eos=True, raw=True)
        found[tuple(made.tokens[:3])] += 1
    assert found.keys() <= expected.keys()
    rare = {text for text, p in expected.items() if count * p < 5}
    cells = [(found[text], count * p) for text, p in expected.items() if text not in rare]
    rest = count * sum(expected[text] for text in rare)
    if rest:
        cells.append((sum(found[text] for text in rare), rest))
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    share = 2 / (9 * freedom)
    assert freedom > 20
    assert chi_square < freedom * (1 - share + 3.719 * math.sqrt(share)) ** 3


def test_a_cache_that_fills_in_mid_round(drafted: Model):
    positions = drafted.engine.capacity
    full = PROMPT * (positions // len(PROMPT) + 1)
    for how in (None, Sampling(0.8, seed=1), Sampling(0.8, seed=1, coupling="rejection")):
        for spare in range(1, 8):
            prompt = full[: positions - spare]
            made = drafted.generate(prompt, 99, sampling=how, ignore_eos=True)
            assert (len(made.tokens), made.stats.finish) == (spare + 1, "context")
            if how is None or how.coupling == "noise":
                plain = drafted.generate(prompt, 99, sampling=how, ignore_eos=True, speculate=False)
                assert made.tokens == plain.tokens


def test_rejected_drafts_are_told(drafted: Model):
    rounds: list[Round] = []
    how = Sampling(0.8, seed=1, coupling="rejection")
    made = drafted.generate(PROMPT, 40, sampling=how, ignore_eos=True, on_round=rounds.append)
    assert sum(len(one.new) - 1 for one in rounds) == made.stats.accepted
    assert all(one.new[:-1] == one.drafts[: len(one.new) - 1] for one in rounds)


@pytest.mark.parametrize("how", [None, Sampling(1.0, top_k=3, repetition_penalty=1.4, seed=2)])
def test_scores_are_torchs_log_softmax(drafted: Model, drafted_folder, how: Sampling | None):
    """Against the engine's own logits to 1e-6, and roughly against transformers in float32, which rounds less."""
    made = drafted.generate(PROMPT, 20, sampling=how, logprobs=5, ignore_eos=True)
    assert made.logprobs is not None
    assert [score.token for score in made.logprobs] == made.tokens
    assert made.tokens == drafted.generate(PROMPT, 20, sampling=how, ignore_eos=True).tokens
    text = [*PROMPT, *made.tokens]
    reference = LlamaForCausalLM.from_pretrained(drafted_folder / "model", dtype=torch.float32)
    theirs = torch.log_softmax(reference(torch.tensor([text])).logits[0].detach(), -1)
    for i, score in enumerate(made.logprobs):
        logits = torch.from_numpy(plain_logits(drafted, text[: len(PROMPT) + i]))
        own = torch.log_softmax(logits.double(), -1)
        best = torch.topk(own, 5)
        assert score.logprob == pytest.approx(float(own[score.token]), abs=1e-6)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [p for _, p in score.top] == pytest.approx(best.values.tolist(), abs=1e-6)
        assert score.logprob == pytest.approx(float(theirs[len(PROMPT) + i - 1, score.token]), abs=0.2)


def test_scores_end_where_the_answer_does(drafted: Model):
    vocabulary = drafted.engine.manifest.vocab_size
    tokens = drafted.generate(PROMPT, 20, ignore_eos=True).tokens
    made = drafted.generate(PROMPT, 20, logprobs=vocabulary + 1, eos_token_ids=[tokens[5]])
    assert made.logprobs is not None
    assert len(made.logprobs) == len(made.tokens) <= 6
    assert len(made.logprobs[0].top) == vocabulary
    with pytest.raises(InputError, match="cannot give the -1 most likely tokens"):
        drafted.generate(PROMPT, 2, logprobs=-1)


@pytest.mark.parametrize("sampling", [None, SETTINGS[0], SETTINGS[4]], ids=["greedy", "sampled", "penalised"])
def test_together_as_alone(drafted_folder: Path, drafted: Model, sampling: Sampling | None):
    """Stop strings, scores and cancelling included."""
    together = load(drafted_folder / "artifact", sequences=3)
    prompts = [[*PROMPT[i:], 40 + i] for i in range(5)]
    how = sampling and replace(sampling, seed=5)
    options: dict[str, Any] = {"sampling": how, "ignore_eos": True, "stop": ["ab", "q"], "logprobs": 2}
    made = together.generate_many(prompts, 40, **options)
    alone = [drafted.generate(prompt, 40, **options) for prompt in prompts]
    for one, other in zip(made, alone, strict=True):
        assert (one.tokens, one.text, one.stats.finish) == (other.tokens, other.text, other.stats.finish)
        assert one.logprobs == other.logprobs
    assert together.generate_many(prompts, 40, cancel=lambda: True)[4].stats.finish == "cancelled"
    tables = together.engine.tables
    assert tables.available == tables.pool

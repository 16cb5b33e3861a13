"""Sequences decoded together get what they get alone, whatever there is place for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import CAPACITY, EOS, VOCAB, compile_toy, model_next, save_toy, table

from specqd.errors import InputError
from specqd.runtime.batch import Batch
from specqd.runtime.model import Model, load

TABLE = table().tolist()
PLANS = [
    "target",
    "target <- draft@fixed:3",
    "target <- suffix:2@fixed:7 | draft@adaptive <- suffix:3@adaptive",
    "target <- draft@fixed:6 <- other@fixed:3 <- suffix:1@fixed:2",
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    save_toy(folder / "a", compile_toy(folder, wrong_every=5))
    return folder / "a"


@pytest.fixture(scope="module")
def models(artifact: Path) -> list[Model]:
    """By how much fits: everything, two sequences in the place of one and a half, one."""
    return [
        load(artifact, sequences=8),
        load(artifact, sequences=5, cache_tokens=CAPACITY + CAPACITY // 2),
        load(artifact),
    ]


def alone(prompt: list[int], limit: int, ends: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + min(limit, CAPACITY - len(prompt) + 1):
        tokens.append(model_next(tokens, TABLE))
        if ends and tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


PROMPT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CAPACITY)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(PLANS), st.lists(PROMPT, max_size=12), st.integers(1, 70), st.booleans())
def test_together_as_alone(
    models: list[Model], data: st.DataObject, plan: str, prompts: list[list[int]], limit: int, ends: bool
):
    model = data.draw(st.sampled_from(models))
    made = model.generate_many(prompts, limit, plan=plan, ignore_eos=not ends)
    assert [one.tokens for one in made] == [alone(prompt, limit, ends) for prompt in prompts]
    for one, prompt in zip(made, prompts, strict=True):
        assert one.stats.new_tokens == len(one.tokens)
        assert one.stats.prompt_tokens == len(prompt)
    tables = model.engine.tables
    assert tables.available == tables.pool


def test_passes_are_shared(artifact: Path):
    model = load(artifact, sequences=8)
    batch = Batch(model.engine)
    for i in range(8):
        batch.add(model.request([i + 1], 20, speculate=False, ignore_eos=True))
    while len(batch):
        batch.step()
    # One pass for all eight prompts, and one for each of the 19 tokens after the first.
    assert batch.passes == 20


def test_what_waits_can_be_cancelled_and_what_runs_gives_its_place_back(artifact: Path):
    model = load(artifact, sequences=2)
    batch = Batch(model.engine)
    requests = [model.request([i + 1], 30, ignore_eos=True) for i in range(3)]
    for request in requests:
        batch.add(request)
    batch.step()
    batch.cancel(requests[2])
    batch.cancel(requests[0])
    assert len(batch) == 1
    given: list[int] = []
    while len(batch):
        for request, new in batch.step():
            assert request is requests[1]
            given += new
    assert given[-10:] == alone([2], 30, False)[-10:]
    assert model.engine.tables.available == model.engine.tables.pool


def test_a_sequence_that_fails_leaves_the_others_alone(artifact: Path):
    model = load(artifact, sequences=3)
    batch = Batch(model.engine)
    requests = [model.request(prompt, 20, ignore_eos=True) for prompt in ([1], [VOCAB + 3], [2])]
    for request in requests:
        batch.add(request)
    given = {request: [] for request in requests}
    while len(batch):
        for request, new in batch.step():
            given[request] += new
    assert [given[requests[i]] for i in (0, 2)] == [alone([1], 20, False), alone([2], 20, False)]
    assert isinstance(requests[1].error, InputError)
    assert "token 53 is not in the model's vocabulary" in str(requests[1].error)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "the prompt is empty"), ([[1] * (CAPACITY + 1)], "the prompt has 65 tokens")],
)
def test_a_prompt_that_cannot_be_decoded_is_refused_before_any_is(
    models: list[Model], prompts: list[list[int]], message: str
):
    with pytest.raises(InputError, match=message):
        models[0].generate_many(prompts)


@pytest.mark.parametrize("options", [{"sequences": 0}, {"cache_tokens": 0}])
def test_impossible_sizes_are_refused(artifact: Path, options: dict[str, int]):
    with pytest.raises(InputError, match="give 1 or more"):
        load(artifact, **options)


def test_a_small_cache_ends_the_text_there(artifact: Path):
    made = load(artifact, cache_tokens=20).generate([1, 2], 100, ignore_eos=True)
    assert made.stats.finish == "context"
    assert made.tokens == alone([1, 2], 31, False)  # 32 positions: whole blocks of 16


def test_two_streams_at_once_need_two_sequences(artifact: Path):
    both = load(artifact, sequences=2)
    one, two = (both.tokens([i], 20, eos_token_ids=()) for i in (1, 2))
    made: tuple[list[int], list[int]] = ([], [])
    for parts in zip(one, two, strict=False):
        for tokens, new in zip(made, parts, strict=True):
            tokens += new
    for tokens, rest, first in zip(made, (one, two), (1, 2), strict=True):
        assert tokens + [t for new in rest for t in new] == alone([first], 20, False)
    assert both.engine.tables.available == both.engine.tables.pool


def test_a_stream_that_was_left_makes_way_for_the_next(artifact: Path):
    model = load(artifact)
    left = model.tokens([1], 20, eos_token_ids=())
    next(left)
    assert model.generate([2], 20, ignore_eos=True).tokens == alone([2], 20, False)
    with pytest.raises(InputError, match="another answer was begun in this one's place"):
        list(left)
    assert model.generate([1], 20, ignore_eos=True).tokens == alone([1], 20, False)


def test_an_answer_beside_a_full_batch_is_refused(artifact: Path):
    model = load(artifact)
    batch = Batch(model.engine)
    batch.add(model.request([1], 20, ignore_eos=True))
    batch.step()
    with pytest.raises(InputError, match="a batch has taken all sequences"):
        model.generate([2], 4)

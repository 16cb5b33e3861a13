"""Sequences that begin alike: they get what they would get alone, feed no more than they must, and lose no block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from accounting import demand_contents, demand_every_block
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from toy import CAPACITY, EOS, VOCAB, Draft, compile_toy, model_next, save_toy, table

from specqd.artifact import Compiled
from specqd.errors import InputError
from specqd.manifest import BLOCK
from specqd.runtime.batch import Batch
from specqd.runtime.choosing import Greedy
from specqd.runtime.levels import Verifier
from specqd.runtime.model import Model, load
from specqd.runtime.plan import Plan
from specqd.runtime.request import Request
from specqd.runtime.sharing import Sharing

TABLE = table().tolist()
DRAFTS = {"draft": Draft("kv", 5), "other": Draft("kv_other", 3), "copy": Draft("kv_other", 4)}
WRITERS = {"target": 0, **{name: draft.wrong_every for name, draft in DRAFTS.items()}}
TOKEN = st.integers(0, VOCAB - 1)
PLANS = [
    "target",
    "target <- draft@fixed:3",
    "target <- other@fixed:3",
    "target <- suffix:2@fixed:7 | other@adaptive <- suffix:3@adaptive",
    "target <- draft@fixed:6 <- other@fixed:3 <- suffix:1@fixed:2",
    "target <- copy@fixed:2",
    "target <- other@fixed:5 <- copy@fixed:2",
    "draft",
    "other <- suffix:1@fixed:2",
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    save_toy(folder / "a", compile_toy(folder, drafts=DRAFTS))
    return folder / "a"


def alone(prompt: list[int], limit: int, entry: str = "target", ends: bool = False) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + min(limit, CAPACITY - len(prompt) + 1):
        tokens.append(model_next(tokens, TABLE, WRITERS[entry]))
        if ends and tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def text(seed: int, length: int) -> list[int]:
    return [(seed * 7 + i * i) % VOCAB for i in range(length)]


class Schedule(RuleBasedStateMachine):
    """Requests that begin like earlier ones and their answers come, are decoded, and are broken off, in any order."""

    artifact: Path

    def __init__(self) -> None:
        super().__init__()
        self.texts = [text(seed, CAPACITY) for seed in range(2)]
        self.given: dict[Request, list[int]] = {}
        self.expected: dict[Request, list[int]] = {}
        self.streams: dict[Request, Iterator[list[int]]] = {}

    @initialize(sequences=st.sampled_from([1, 2, 4]), blocks=st.sampled_from([4, 6, 9, 16]))
    def load(self, sequences: int, blocks: int) -> None:
        self.model = load(self.artifact, 1, sequences=sequences, cache_tokens=blocks * BLOCK)
        self.batch = Batch(self.model.engine)

    def request(self, data: st.DataObject) -> Request:
        begun = data.draw(st.sampled_from([self.texts[0], *self.texts[-2:]]))
        prompt = begun[: data.draw(st.integers(BLOCK - 1, 40))] + data.draw(st.lists(TOKEN, max_size=3))
        limit, plan = data.draw(st.integers(1, 30)), data.draw(st.sampled_from(PLANS))
        request = self.model.request(prompt, limit, plan=plan, ignore_eos=True)
        self.given[request] = []
        self.expected[request] = alone(prompt, limit, request.plan.target)
        self.texts.append((prompt + self.expected[request])[:CAPACITY])
        return request

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self.batch.add(self.request(data))

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for request, new in self.batch.step():
                self.take(request, new)
            demand_every_block(self.model.engine.tables)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.given)))
        if request not in self.streams:
            self.batch.cancel(request)
            del self.given[request]

    @rule(data=st.data())
    def stream(self, data: st.DataObject) -> None:
        request = self.request(data)
        self.streams[request] = self.model._rounds(request)

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), rounds=st.integers(1, 12), leave=st.booleans())
    def go_on(self, data: st.DataObject, rounds: int, leave: bool) -> None:
        request = data.draw(st.sampled_from(list(self.streams)))
        stream = self.streams[request]
        try:
            for new in islice(stream, rounds):
                self.take(request, new)
            over = self.given[request] == self.expected[request]
        except InputError as error:
            assert re.search("in this one's place|has taken all|cache is full", str(error))  # noqa: PT017
            over = True
        if over or leave:
            stream.close()
            del self.streams[request], self.given[request]

    def take(self, request: Request, new: list[int]) -> None:
        self.given[request] += new
        done = len(self.given[request])
        assert self.given[request] == self.expected[request][:done]

    @invariant()
    def nothing_is_lost_or_overwritten(self) -> None:
        if hasattr(self, "model"):
            demand_every_block(self.model.engine.tables)
            demand_contents(self.model.engine, WRITERS)

    def teardown(self) -> None:
        for request, stream in self.streams.items():
            stream.close()
            del self.given[request]
        if hasattr(self, "model"):
            while len(self.batch):
                self.step(1)
            tables = self.model.engine.tables
            assert tables.available == tables.pool
        for request, tokens in self.given.items():
            assert request.error is None
            assert tokens == self.expected[request]


def test_any_schedule(artifact: Path) -> None:
    Schedule.artifact = artifact
    run_state_machine_as_test(
        Schedule, settings=settings(max_examples=100, stateful_step_count=25, deadline=None)
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """With one entry only for the other cache."""
    return compile_toy(tmp_path_factory.mktemp("toy"), wrong_every=5)


@pytest.fixture
def model(artifact: Path) -> Model:
    return load(artifact, 1, sequences=4)


def reused(
    model: Model, prompt: list[int], plan: str = "target", limit: int = 4, writers: dict[str, int] = WRITERS
) -> int:
    made = model.generate(prompt, limit, plan=plan, ignore_eos=True)
    assert made.tokens == alone(prompt, limit, plan.split()[0])
    demand_every_block(model.engine.tables)
    demand_contents(model.engine, writers)
    return made.stats.reused_tokens


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 40, CAPACITY])
def test_a_prompt_that_was_answered_is_fed_no_more_than_its_last_token(model: Model, length: int):
    prompt = text(3, length)
    assert [reused(model, prompt) for _ in range(3)] == [0, length - 1, length - 1]


@pytest.mark.parametrize("agreed", [0, 1, 15, 16, 17, 31, 32, 39])
def test_prompts_share_as_far_as_they_agree(model: Model, agreed: int):
    prompt = text(3, 40)
    reused(model, prompt)
    assert reused(model, [*prompt[:agreed], (prompt[agreed] + 1) % VOCAB, 5, 6]) == agreed


def test_a_chat_that_goes_on_feeds_what_is_new(model: Model):
    prompt = text(3, 20)
    answer = model.generate(prompt, 10, ignore_eos=True).tokens
    # The last token of an answer is never fed.
    assert reused(model, [*prompt, *answer, 1, 2, 3]) == 20 + 10 - 1


def test_what_a_cancelled_answer_held_is_of_use(model: Model):
    prompt = text(3, 20)
    rounds = model.tokens(prompt, 30, plan="target", eos_token_ids=())
    new = [token for _ in range(15) for token in next(rounds)]
    rounds.close()
    assert reused(model, [*prompt, *new, 1]) == 20 + len(new) - 1


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_many_answers_to_one_prompt_feed_it_once(artifact: Path, prefix_sharing: bool):
    model = load(artifact, 1, sequences=8, prefix_sharing=prefix_sharing)
    prompt = text(3, 40)
    made = model.generate_many([prompt] * 8, 9, plan="target", ignore_eos=True)
    assert all(one.tokens == alone(prompt, 9) for one in made)
    fed = 40 - 1 if prefix_sharing else 0
    assert [one.stats.reused_tokens for one in made] == [0] + [fed] * 7


def test_sharing_makes_room(artifact: Path):
    """Two blocks are common; each sequence takes two more, and there are ten: four sequences instead of two."""
    model = load(artifact, 1, sequences=8, cache_tokens=10 * BLOCK)
    common = text(3, 2 * BLOCK)
    batch = Batch(model.engine)
    for i in range(5):
        batch.add(model.request([*common, i], 31, plan="target", ignore_eos=True))
    most = 0
    while len(batch):
        batch.step()
        most = max(most, sum(bool(held) for held in model.engine.tables._held))
    assert most == 4


def test_a_draft_with_a_cache_of_its_own_goes_on_from_what_it_has_fed_itself(
    compiled: Compiled, tmp_path: Path
):
    save_toy(tmp_path / "a", compiled)
    model, prompt, writers = load(tmp_path / "a", 1), text(3, 40), {"target": 0, "draft": 5, "other": 5}
    assert reused(model, prompt, writers=writers) == 0
    for _ in range(2):  # The draft feeds its part into the shared blocks, and finds it there the second time.
        assert reused(model, prompt, "target <- other@fixed:3", writers=writers) == 39
    found = model.engine.tables.index._known.values()
    assert sum(known.fed.get("other") == BLOCK for known in found) >= 2


@pytest.mark.parametrize(
    "plans", [("target", "draft"), ("target <- other@fixed:2", "target <- copy@fixed:2")]
)
def test_entries_that_fill_one_cache_share_nothing(model: Model, plans: tuple[str, str]):
    prompt = text(3, 40)
    assert [reused(model, prompt, plan, 12) for plan in (*plans, *plans)] == [0, 0, 39, 39]


@pytest.mark.parametrize(
    ("plan", "known"), [("target <- other@fixed:1", 32), ("target <- other@fixed:1 <- copy@fixed:1", 20)]
)
def test_what_a_lent_cache_holds_is_shared_as_far_as_its_owner_fed_it(artifact: Path, plan: str, known: int):
    """A level that works on the cache of `other` leaves drafts beyond that."""
    engine = load(artifact, 1, sequences=2).engine
    prompt = text(3, 33)

    def sharing() -> tuple[Sharing, Verifier, Verifier]:
        target = Plan.parse(plan).build(engine, Greedy())
        other = target.below[0].level
        assert isinstance(other, Verifier)
        return Sharing(engine, target, prompt), target, other

    first, target, other = sharing()
    assert first.enter(engine.tables.take() or 0, 33) == 0
    engine.tables.hold(0, 33)
    target.fed, other.fed = 33, 20
    first.note(prompt, rest=True)
    again, target, other = sharing()
    assert again.enter(engine.tables.take() or 0, 33) == target.fed == known
    assert other.fed == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_mb": 5e-5}, r"5e-05 MB holds not even a block of 16 tokens, which takes 6.4e-05 MB"),
        ({"cache_mb": float("nan")}, "holds not even a block"),
        ({"cache_mb": 1, "cache_tokens": 16}, "not both"),
    ],
)
def test_budgets_that_are_refused(artifact: Path, options: dict[str, float], message: str):
    with pytest.raises(InputError, match=message):
        load(artifact, **options)


@pytest.mark.parametrize(("blocks", "pool"), [(1.0, 1), (2.9, 2), (7.0, 7), (1000.0, 8)])
def test_a_budget_in_megabytes_is_one_of_blocks(artifact: Path, blocks: float, pool: int):
    of_block = 2 * BLOCK * 2 / 1e6  # two caches, two bytes a position
    engine = load(artifact, 1, sequences=2, cache_mb=blocks * of_block).engine
    assert engine.tables.pool == pool
    assert engine.capacity == min(CAPACITY, pool * BLOCK)


def test_what_can_never_fit_is_refused_at_once_and_what_does_not_fit_now_waits(artifact: Path):
    model = load(artifact, 1, sequences=4, cache_tokens=3 * BLOCK)
    batch = Batch(model.engine)
    requests = [model.request(text(seed, 20), 20, plan="target", ignore_eos=True) for seed in range(3)]
    never = model.request(text(9, 3 * BLOCK + 1), 2)
    for request in (*requests, never):
        batch.add(request)
    assert len(batch) == 3
    assert (
        "the prompt has 49 tokens and the cache holds 48: shorten it, or load with `cache_tokens=51`"
        in str(never.error)
    )
    given: dict[Request, list[int]] = {request: [] for request in requests}
    while len(batch):
        for request, new in batch.step():
            given[request] += new
        assert sum(bool(held) for held in model.engine.tables._held) <= 1
    assert [given[request] for request in requests] == [alone(text(seed, 20), 20) for seed in range(3)]

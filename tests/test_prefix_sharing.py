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

from specqd.errors import InputError
from specqd.manifest import BLOCK
from specqd.runtime.batch import Batch
from specqd.runtime.model import load
from specqd.runtime.request import Request

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
        begun = data.draw(st.sampled_from(self.texts))
        prompt = begun[: data.draw(st.integers(1, len(begun)))] + data.draw(st.lists(TOKEN, max_size=5))
        prompt, limit, plan = (
            prompt[:CAPACITY],
            data.draw(st.integers(1, 50)),
            data.draw(st.sampled_from(PLANS)),
        )
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

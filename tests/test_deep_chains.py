"""Chains of up to four drafts, each with a cache of its own or its asker's: what each level says, and the output.

Whatever the caches hold of rejected tokens, every level must propose just what it would choose itself after the text.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy import CAPACITY, EOS, VOCAB, Draft, compile_toy, model_next, save_toy, table

from specqd.errors import InputError
from specqd.manifest import LevelRecord
from specqd.runtime.asking import Asked, Steps
from specqd.runtime.choosing import Choice
from specqd.runtime.levels import Verifier
from specqd.runtime.model import Model, load

TABLE = table().tolist()
SHORT = 24
DRAFTS = {
    "a": Draft("kv", 7, rows=(1, 2, 3, 4, 8)),
    "b": Draft("kv_b", 5, rows=(1, 2, 4)),
    "c": Draft("kv_b", 3, rows=(1, 3)),
    "d": Draft("kv_d", 2, rows=(1, 2, 4)),
}
RULES = ("fixed:1", "fixed:3", "fixed:6", "adaptive", "heuristic:2")
FOUR_DEEP = [
    "target <- a@fixed:6 <- b@fixed:4 <- c@fixed:3 <- d@fixed:2",
    "target <- a@adaptive <- b@adaptive <- c@adaptive <- d@adaptive <- suffix:1@adaptive",
    "target <- suffix:2@fixed:5 | a@fixed:7 <- d@fixed:3 <- b@fixed:2 <- c@fixed:1 <- suffix:1@fixed:4",
    "target <- d@fixed:5 <- c@fixed:4 <- b@fixed:3 <- suffix:1@fixed:2",
    "target <- b@fixed:6 <- c@fixed:4 <- d@fixed:3 <- suffix:1@fixed:2",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("deep")
    records = {
        name: LevelRecord(capacity=SHORT if name == "d" else CAPACITY, vocab_size=VOCAB) for name in DRAFTS
    }
    save_toy(folder / "a", compile_toy(folder, drafts=DRAFTS), chain=("target", *DRAFTS), levels=records)
    return load(folder / "a")


def continued(text: list[int], count: int, wrong_every: int = 0, eos: int | None = None) -> list[int]:
    """Greedy tokens of a toy alone, up to its first `eos`."""
    tokens = list(text)
    while len(tokens) < len(text) + count and (len(tokens) == len(text) or tokens[-1] != eos):
        tokens.append(model_next(tokens, TABLE, wrong_every))
    return tokens[len(text) :]


@pytest.fixture(autouse=True, scope="module")
def proposals() -> Iterator[dict[str, int]]:
    """Check whatever a compiled level proposes; count the tokens."""
    counted = dict.fromkeys(DRAFTS, 0)
    propose = Verifier.propose

    def checked(self: Verifier, text: list[int], asked: Asked) -> Steps[list[Choice]]:
        before = list(text)
        found = yield from propose(self, text, asked)
        tokens = [choice.token for choice in found]
        eos = EOS if self.stop else None
        assert tokens == continued(before, len(tokens), DRAFTS[self.entry].wrong_every, eos)
        assert text == before
        assert len(tokens) <= asked.most
        counted[self.entry] += len(tokens)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verifier, "propose", checked)
        yield counted


def answer(prompt: list[int], limit: int, eos: int | None) -> list[int]:
    """What the target says alone, until the cache is full."""
    return continued(prompt, min(limit, CAPACITY - len(prompt) + 1), eos=eos)


@pytest.mark.parametrize("plan", FOUR_DEEP)
@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("length", [1, 9, SHORT - 1, SHORT, SHORT + 1, CAPACITY - 1, CAPACITY])
def test_four_deep(model: Model, proposals: dict[str, int], plan: str, ignore_eos: bool, length: int):
    """From an empty cache to a full one, and over the end of the smallest."""
    before = dict(proposals)
    for start in range(5):
        prompt = [(start * 13 + 5 * i) % VOCAB for i in range(length)]
        made = model.generate(prompt, 2 * CAPACITY, plan=plan, ignore_eos=ignore_eos)
        assert made.tokens == answer(prompt, 2 * CAPACITY, None if ignore_eos else EOS)
    if length < SHORT - 1 and ignore_eos and "adaptive" not in plan:
        asked = [name for name in DRAFTS if f" {name}@" in plan]
        assert all(proposals[name] > before[name] for name in asked)


def test_a_text_that_ends_within_a_draft(model: Model):
    """Wherever the end comes, it is the last token, and what was drafted beyond it is dropped."""
    ends = 0
    for start in range(40):
        prompt = [start, 3, start]
        expected = answer(prompt, CAPACITY, EOS)
        for plan in FOUR_DEEP:
            made = model.generate(prompt, CAPACITY, plan=plan)
            assert made.tokens == expected
        ends += expected[-1] == EOS and len(expected) > 2
    assert ends > 10


@st.composite
def plans(draw: st.DrawFn) -> str:
    """Any chain of the drafts, once each, with searches beside and below them."""
    names = draw(st.permutations(list(DRAFTS)))[: draw(st.integers(1, 4))]
    levels = []
    while names:
        count = draw(st.integers(1, min(2, len(names))))
        links = [f"{name}@{draw(st.sampled_from(RULES))}" for name in names[:count]]
        names = names[count:]
        search = [f"suffix:{draw(st.integers(1, 3))}@fixed:{draw(st.integers(1, 8))}"]
        levels.append(" | ".join([*(search if draw(st.booleans()) else []), *links]))
    below = [f"suffix:1@fixed:{draw(st.integers(1, 5))}"] if draw(st.booleans()) else []
    return " <- ".join(["target", *levels, *below])


@settings(max_examples=150, deadline=None)
@given(plans(), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CAPACITY), st.integers(1, 70))
def test_any_chain(model: Model, plan: str, prompt: list[int], limit: int):
    """The tokens of the target, but for plans that are refused because levels would overwrite each other's caches."""
    first = plan.split(" <- ")[1]
    overwrites = ("a@" in plan and "a@" not in first) or ("b@" in plan and "c@" in plan)
    try:
        made = model.generate(prompt, limit, plan=plan)
    except InputError as error:
        assume(not (overwrites and "would overwrite a cache that another level relies on" in str(error)))
        raise
    assert made.tokens == answer(prompt, limit, EOS)
    for level in made.stats.levels:
        assert level.accepted <= level.examined <= level.proposed

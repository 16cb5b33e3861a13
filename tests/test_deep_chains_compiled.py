"""Chains of real levels, compiled: a copy over the target's cache, a trimmed copy, another checkpoint, a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_join import small

import specqd
from specqd.codegen import library
from specqd.passes.speculate.join import join
from specqd.runtime.asking import Asked, Steps
from specqd.runtime.choosing import Choice
from specqd.runtime.levels import Verifier
from specqd.runtime.model import Model

pytestmark = pytest.mark.slow

CONTEXT, SHORT, VOCAB, EOS = 72, 40, 61, 60
PIPELINE = (
    f"fuse-rms-norm, fuse-rope, fuse-linear, insert-kv-cache{{capacity={CONTEXT}}}, "
    "derive-draft{entry=a}, a: cast-mxfp4{scale=search}, a: share-kv, "
    "derive-draft{entry=b}, b: trim-vocabulary{tokens=48}, b: cast-mxfp4, c: cast-int8"
)
FOUR_DEEP = [
    "target <- a@fixed:6 <- b@fixed:4 <- c@fixed:2",
    "target <- a@fixed:6 <- b@fixed:4 <- c@fixed:3 <- suffix:1@fixed:3",
    "target <- suffix:2@fixed:7 | b@fixed:5 <- c@fixed:4 <- suffix:1@fixed:2",
    "target <- suffix:2@adaptive | a@adaptive <- c@adaptive <- b@adaptive <- suffix:1@adaptive",
]
RULES = ("fixed:1", "fixed:4", "adaptive", "confidence:0.2", "entropy")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """The artifact loaded twice: one copy speculates, of the other each level can be asked alone."""
    joined = join(small(2, vocab=VOCAB), small(1, vocab=VOCAB, positions=SHORT), "c")
    joined.model = replace(joined.model, eos_token_ids=(EOS,))
    target = tmp_path_factory.mktemp("deep") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "VERIFY_ROWS", (1, 2, 6))
        patch.setattr(library, "PREFILL_ROWS", ())
        specqd.compile(joined, target, pipeline=PIPELINE)
    return specqd.load(target), specqd.load(target)


@pytest.fixture(autouse=True, scope="module")
def checked(pair: tuple[Model, Model]) -> Iterator[None]:
    """Let levels with a cache of their own propose nothing but what they say alone."""
    alone, propose = pair[1], Verifier.propose

    def check(self: Verifier, text: list[int], asked: Asked) -> Steps[list[Choice]]:
        found = [choice.token for choice in (yield from propose(self, text, asked))]
        if found and not self.shares:
            own = alone.generate(text, len(found), plan=self.entry, ignore_eos=not self.stop).tokens
            assert found == own, self.entry
        return [Choice(token) for token in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verifier, "propose", check)
        yield


@pytest.mark.parametrize("plan", FOUR_DEEP)
@pytest.mark.parametrize("length", [1, 30, SHORT, CONTEXT - 3, CONTEXT])
def test_levels_give_the_tokens_of_the_target(pair: tuple[Model, Model], plan: str, length: int):
    model = pair[0]
    for start in range(3):
        prompt = [(start * 17 + i * i) % VOCAB for i in range(length)]
        for ignore_eos in (True, False):
            plain = model.generate(prompt, CONTEXT, speculate=False, ignore_eos=ignore_eos)
            made = model.generate(prompt, CONTEXT, plan=plan, ignore_eos=ignore_eos)
            assert made.tokens == plain.tokens


@st.composite
def plans(draw: st.DrawFn) -> str:
    """Chains of any of the levels, the one that shares the target's cache only directly below it."""
    names = draw(st.permutations(["b", "c"]))[: draw(st.integers(0, 2))]
    names = ["a", *names] if draw(st.booleans()) else names
    levels = [f"{name}@{draw(st.sampled_from(RULES))}" for name in names]
    if levels and draw(st.booleans()):
        levels[0] = f"suffix:{draw(st.integers(1, 3))}@fixed:5 | {levels[0]}"
    below = [f"suffix:1@fixed:{draw(st.integers(1, 5))}"] if draw(st.booleans()) else []
    return " <- ".join(["target", *levels, *below])


@settings(max_examples=40, deadline=None)
@given(plans(), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), st.integers(1, 60))
def test_any_chain(pair: tuple[Model, Model], plan: str, prompt: list[int], limit: int):
    model = pair[0]
    plain = model.generate(prompt, limit, speculate=False).tokens
    assert model.generate(prompt, limit, plan=plan).tokens == plain

"""The prefix index finds the longest beginning that blocks hold, against a search of all that it was told."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import takewhile

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specqd.manifest import BLOCK
from specqd.runtime.prefix import PrefixIndex, chain

ENTRIES = ("target", "draft", "sibling")
LINEAGES = (("target",), ("target", "draft"))

# Texts that often begin alike: blocks of one token each, of which the last may end differently.
BLOCKS = st.lists(st.integers(0, 1), max_size=3).map(lambda b: [t for token in b for t in [token] * BLOCK])
TEXTS = st.tuples(BLOCKS, st.lists(st.integers(0, 1), max_size=BLOCK - 1)).map(
    lambda parts: parts[0] + parts[1]
)


@dataclass
class Told:
    """A block: its lineage, the text before it, its own tokens, and how many of them each entry has fed."""

    lineage: tuple[str, ...]
    before: list[int]
    tokens: list[int]
    fed: dict[str, int] = field(default_factory=dict)


class Index(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.told: dict[int, Told] = {}
        self.blocks = 0

    @rule(text=TEXTS, lineage=st.sampled_from(LINEAGES), data=st.data())
    def learn(self, text: list[int], lineage: tuple[str, ...], data: st.DataObject) -> None:
        if not text:
            return
        start = (len(text) - 1) // BLOCK * BLOCK
        tokens = text[start:]
        fed = {entry: data.draw(st.integers(0, len(tokens))) for entry in ENTRIES[1:]}
        fed["target"] = len(tokens)
        block, self.blocks = self.blocks, self.blocks + 1
        known = [
            one.tokens for one in self.told.values() if (one.lineage, one.before) == (lineage, text[:start])
        ]
        self.index.learn(block, chain(lineage, text)[start // BLOCK], tokens, fed)
        assert (block in self.index) == all(one[: len(tokens)] != tokens for one in known)
        if block in self.index:
            self.told[block] = Told(lineage, text[:start], tokens, fed)

    @precondition(lambda self: self.told)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=BLOCK))
    def learn_more(self, data: st.DataObject, more: list[int]) -> None:
        block = data.draw(st.sampled_from(sorted(self.told)))
        one = self.told[block]
        tokens = (one.tokens + more)[:BLOCK]
        fed = {entry: data.draw(st.integers(0, len(tokens))) for entry in ENTRIES[1:]} | {
            "target": len(tokens)
        }
        self.index.learn(block, chain(one.lineage, one.before)[-1], tokens, fed)
        one.tokens = tokens
        one.fed = {entry: max(one.fed[entry], fed[entry]) for entry in ENTRIES}
        others = [o for b, o in self.told.items() if b != block and o.lineage == one.lineage]
        if len(tokens) == BLOCK and any((o.before, o.tokens) == (one.before, tokens) for o in others):
            del self.told[block]
        assert (block in self.index) == (block in self.told)

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.told)))
        self.index.forget(block)
        del self.told[block]

    @rule(text=TEXTS, lineage=st.sampled_from(LINEAGES), needed=st.sets(st.sampled_from(ENTRIES), max_size=2))
    def find(self, text: list[int], lineage: tuple[str, ...], needed: set[str]) -> None:
        needed |= {"target"}
        found = self.index.find(chain(lineage, text), text, ENTRIES, needed)
        assert found.length == self.longest(text, lineage, needed)
        parts = [self.told[block] for block in (*found.blocks, *([] if found.rest is None else [found.rest]))]
        held: list[int] = []
        for one in parts:
            assert (one.lineage, one.before) == (lineage, held)
            held = held + one.tokens
        assert held[: found.length] == text[: found.length]
        assert all(len(one.tokens) == BLOCK for one in parts[: len(found.blocks)])
        for entry in ENTRIES:
            whole = found.fed[entry] // BLOCK
            assert all(one.fed[entry] == BLOCK for one in parts[:whole])
            if whole < len(parts):
                most = min(BLOCK, found.length - whole * BLOCK)
                assert found.fed[entry] % BLOCK == min(parts[whole].fed[entry], most)
            assert entry not in needed or found.fed[entry] == found.length

    def longest(self, text: list[int], lineage: tuple[str, ...], needed: set[str], start: int = 0) -> int:
        agreed = 0
        for one in self.told.values():
            if (one.lineage, one.before) == (lineage, text[:start]):
                usable = one.tokens[: min(one.fed[entry] for entry in needed)]
                pairs = zip(usable, text[start:], strict=False)
                agreed = max(agreed, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return start + agreed if agreed < BLOCK else self.longest(text, lineage, needed, start + BLOCK)

    @invariant()
    def knows_what_it_was_told(self) -> None:
        assert {block for block in range(self.blocks) if block in self.index} == self.told.keys()


Index.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestIndex = Index.TestCase


@given(TEXTS, TEXTS, st.sampled_from(LINEAGES), st.sampled_from(LINEAGES))
def test_digests_are_equal_as_far_as_the_texts(
    a: list[int], b: list[int], one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    of_a, of_b = chain(one, a), chain(reversed(other), b)
    assert len(of_a) == len(a) // BLOCK + 1
    for count in range(min(len(of_a), len(of_b))):
        same = one == other and a[: count * BLOCK] == b[: count * BLOCK]
        assert (of_a[count] == of_b[count]) == same


def test_the_digest_is_sha_256_of_what_came_before_and_the_tokens_in_32_bits() -> None:
    tokens = list(range(300, 300 + BLOCK))
    seed = hashlib.sha256(b"draft\0target").digest()
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert chain(["target", "draft"], tokens) == [seed, hashlib.sha256(seed + data).digest()]

"""Block tables: every block accounted for whatever is asked, shared ones kept as long as needed, reservations too."""

from __future__ import annotations

import pytest
from accounting import demand_every_block
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specqd.errors import InputError
from specqd.manifest import BLOCK
from specqd.runtime.blocks import BlockTables, blocks_for
from specqd.runtime.prefix import digest

SEQUENCES, CAPACITY, POOL = 4, 5 * BLOCK - 3, 11


class Tables(RuleBasedStateMachine):
    """Beside the tables runs a model of them: each sequence's blocks, and the kept ones, the longest unused first."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(SEQUENCES, CAPACITY, POOL)
        self.held: dict[int, list[int]] = {}
        self.promised: dict[int, int] = {}
        self.known: set[int] = set()
        self.kept: list[int] = []
        self.texts = 0

    def spoken_for(self) -> int:
        held = {block for blocks in self.held.values() for block in blocks}
        return len(held) + sum(max(0, self.promised[s] - len(b)) for s, b in self.held.items())

    @rule(data=st.data(), length=st.integers(1, CAPACITY))
    def let_in(self, data: st.DataObject, length: int) -> None:
        sequence = self.tables.take()
        assert (sequence is None) == (len(self.held) == SEQUENCES)
        if sequence is None:
            return
        assert sequence not in self.held
        sources = [[], *self.held.values(), [*self.kept]]
        blocks = data.draw(st.sampled_from(sources))[: data.draw(st.integers(0, blocks_for(length)))]
        self.tables.share(sequence, blocks)
        self.held[sequence], self.promised[sequence] = list(blocks), 0
        self.kept = [block for block in self.kept if block not in blocks]
        room = POOL - self.spoken_for()
        fits = self.tables.reserve(sequence, length)
        assert fits == (blocks_for(length) - len(blocks) <= room)
        if fits:
            self.promised[sequence] = blocks_for(length)
        else:
            self.give_back(sequence)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), length=st.integers(1, CAPACITY))
    def grow(self, data: st.DataObject, length: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.held)))
        blocks = self.held[sequence]
        more = max(0, blocks_for(length) - len(blocks))
        beyond = max(0, blocks_for(length) - max(len(blocks), self.promised[sequence]))
        room = POOL - self.spoken_for()
        free = POOL - len({b for held in self.held.values() for b in held}) - len(self.kept)
        try:
            self.tables.hold(sequence, length)
        except InputError as error:
            assert beyond > room
            assert "positions are held by" in str(error)  # noqa: PT017
            return
        assert beyond <= room
        self.promised[sequence] = max(self.promised[sequence], blocks_for(length) if more else 0)
        found = self.tables.blocks(sequence)
        assert found[: len(blocks)] == blocks and len(found) == len(blocks) + more
        evicted = [block for block in found[len(blocks) :] if block in self.kept]
        assert evicted == self.kept[: len(evicted)]
        assert len(evicted) == max(0, more - free)
        self.kept = self.kept[len(evicted) :]
        self.known -= set(evicted)
        self.held[sequence] = found

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def become_known(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({b for blocks in self.held.values() for b in blocks})))
        self.texts += 1
        if block not in self.known:
            self.tables.index.learn(block, digest(b"", [self.texts]), list(range(BLOCK)), {})
            self.known.add(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.give_back(data.draw(st.sampled_from(sorted(self.held))))

    def give_back(self, sequence: int) -> None:
        self.tables.release(sequence)
        blocks = self.held.pop(sequence)
        del self.promised[sequence]
        still = {block for others in self.held.values() for block in others}
        self.kept += [block for block in reversed(blocks) if block in self.known and block not in still]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        demand_every_block(self.tables)
        assert list(self.tables._kept) == self.kept
        assert {block for block in range(POOL) if block in self.tables.index} == self.known
        assert self.tables.available == POOL - self.spoken_for()
        for sequence, blocks in self.held.items():
            assert self.tables.blocks(sequence) == blocks


Tables.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTables = Tables.TestCase


def test_the_only_sequence_lies_in_order_even_after_it_was_released() -> None:
    tables = BlockTables(1, CAPACITY, 5)
    for lengths in ((1, 40, CAPACITY), (CAPACITY,), (20,)):
        for length in lengths:
            tables.hold(0, length)
        assert tables.blocks(0) == list(range(blocks_for(length)))
        tables.release(0)


def test_what_was_fed_without_being_taken_does_not_keep_the_place() -> None:
    tables = BlockTables(1, CAPACITY, 5)
    tables.hold(0, CAPACITY)
    assert tables.take() == 0
    assert tables.available == 5
    assert tables.take() is None


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for(positions: int, blocks: int) -> None:
    assert blocks_for(positions) == blocks

"""Block tables: no block in two hands, none lost, and a reservation is kept."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specqd.errors import InputError
from specqd.manifest import BLOCK
from specqd.runtime.blocks import BlockTables, blocks_for

SEQUENCES, CAPACITY, POOL = 4, 5 * BLOCK - 3, 11


class Tables(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(SEQUENCES, CAPACITY, POOL)
        self.lengths: dict[int, int] = {}
        self.promised: dict[int, int] = {}

    @rule(length=st.integers(1, CAPACITY))
    def let_in(self, length: int) -> None:
        sequence = self.tables.take()
        assert (sequence is None) == (len(self.lengths) == SEQUENCES)
        if sequence is None:
            return
        assert sequence not in self.lengths
        spoken_for = sum(max(blocks_for(self.promised[s]), blocks_for(self.lengths[s])) for s in self.lengths)
        fits = self.tables.reserve(sequence, length)
        assert fits == (spoken_for + blocks_for(length) <= POOL)
        if fits:
            self.lengths[sequence], self.promised[sequence] = 0, length
        else:
            self.tables.release(sequence)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data(), length=st.integers(1, CAPACITY))
    def grow(self, data: st.DataObject, length: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.lengths)))
        before = self.table(sequence)
        try:
            self.tables.hold(sequence, length)
        except InputError as error:
            assert length > self.promised[sequence]
            assert "positions are held by" in str(error)  # noqa: PT017
        else:
            self.lengths[sequence] = max(self.lengths[sequence], length)
        assert self.table(sequence)[: len(before)] == before

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.lengths)))
        self.tables.release(sequence)
        del self.lengths[sequence], self.promised[sequence]

    def table(self, sequence: int) -> list[int]:
        begin = self.tables.begin(sequence)
        return self.tables.flat[begin : begin + blocks_for(self.lengths[sequence])].tolist()

    @invariant()
    def no_block_is_in_two_hands(self) -> None:
        held = [block for sequence in self.lengths for block in self.table(sequence)]
        assert len(set(held)) == len(held)
        assert all(0 <= block < POOL for block in held)
        spoken_for = sum(max(blocks_for(self.promised[s]), blocks_for(self.lengths[s])) for s in self.lengths)
        assert self.tables.available == POOL - spoken_for


Tables.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestTables = Tables.TestCase


def test_the_only_sequence_lies_in_order_even_after_it_was_released() -> None:
    tables = BlockTables(1, CAPACITY, 5)
    for lengths in ((1, 40, CAPACITY), (CAPACITY,), (20,)):
        for length in lengths:
            tables.hold(0, length)
        assert tables.flat[: blocks_for(length)].tolist() == list(range(blocks_for(length)))
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

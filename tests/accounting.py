"""What must hold of the blocks of the caches whenever no pass runs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from toy import WRITER

from specqd.manifest import BLOCK
from specqd.runtime.blocks import BlockTables
from specqd.runtime.engine import Engine

__all__ = ["demand_contents", "demand_every_block"]


def demand_every_block(tables: BlockTables) -> None:
    """Each block is free, or kept, or held by as many tables as it says: exactly one of them, and none is lost."""
    listed = Counter(block for sequence in range(tables.sequences) for block in tables.blocks(sequence))
    assert all(len(set(tables.blocks(s))) == len(tables.blocks(s)) for s in range(tables.sequences))
    assert Counter([*tables._free, *tables._kept, *listed]) == Counter(range(tables.pool))
    assert tables._holders == [listed[block] for block in range(tables.pool)]
    assert all(block in tables.index for block in tables._kept)
    assert not any(block in tables.index for block in tables._free)
    reserved = sum(max(0, r - h) for r, h in zip(tables._reserved, tables._held, strict=True))
    assert tables.available == tables.pool - len(listed) - reserved >= 0
    demand_index(tables)


def demand_index(tables: BlockTables) -> None:
    """All ways to a known block are of its text, and none leads to another."""
    index = tables.index
    assert sorted(block for beside in index._after.values() for block in beside) == sorted(index._known)
    for before, beside in index._after.items():
        assert beside and all(index._known[block].before == before for block in beside)
    whole = [block for block, known in index._known.items() if len(known.tokens) == BLOCK]
    assert sorted(index._whole.values()) == sorted(whole)


def demand_contents(engine: Engine, writers: dict[str, int]) -> None:
    """What is known of a block stands in the toy's caches, as the entry that it is known of wrote it.

    `writers`: `wrong_every` of each entry.
    """
    args = {f.entry: next(a for a in f.args if a.kind == "cache") for f in engine.manifest.functions}
    for block, known in engine.tables.index._known.items():
        for entry, count in known.fed.items():
            slots = engine.memory.array(args[entry])[block * BLOCK : block * BLOCK + count]
            assert np.array_equal(slots, np.array(known.tokens[:count]) + WRITER * writers[entry])

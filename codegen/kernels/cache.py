"""How a cache lies in memory: blocks of 16 positions in any order, and the formats of the keys and values in them.

A cache is made of planes, one for each layer and key head; a plane of blocks: a table says where the blocks of a
sequence lie. In a block of keys pairs of channels lie outside and positions inside, so that scores are a small matrix
kernel without horizontal sums; values lie position by position. Scales follow the numbers that they belong to, in the
same block: what it means depends on nothing else.

A format that rounds whole blocks has beside it the newest blocks of each sequence in BF16, which newer ones replace in
turn: positions are written there, and a block is packed from there by the pass that makes it whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.activations import bf16_bits
from specqd.codegen.tir import I, bind, f32, i32, load, local, splat, tirx
from specqd.errors import CodegenError
from specqd.manifest import BLOCK

__all__ = [
    "BF16Keys",
    "BF16Values",
    "ByPosition",
    "Keys",
    "Paged",
    "Recent",
    "Values",
    "as_float",
    "by_position",
]


@dataclass(frozen=True)
class _Format(ABC):
    """The form of the keys or values of one head: `channels` of them a position.

    `base` is a block's first element in the buffer, `slot` a position's place in the block.
    """

    isa: ISA
    channels: int
    #: what the buffer is made of
    dtype: ClassVar[str]
    #: channels in an element
    packed: ClassVar[int] = 1

    @property
    @abstractmethod
    def elements(self) -> int:
        """Elements of a block."""

    @property
    def line(self) -> int:
        """Channels in a line of the CPU's caches."""
        return 512 // int(self.dtype.removeprefix("int")) * self.packed

    @property
    def group(self) -> int:
        """Neighbouring channels that share a scale."""
        return self.channels

    @abstractmethod
    def pack(self, buffer: Any, base: Any, recent: BF16Keys | BF16Values, source: Any, of: Any) -> None:
        """Write a whole block that begins at `of` in the BF16 buffer `source`."""

    def scales(self, buffer: Any, base: Any, group: Any, slot: int) -> Any:
        """Load the scales of a group of channels at as many positions from `slot` as there are lanes, if it has any."""
        return None


class ByPosition(_Format):
    """A form in which a position does not depend on the others of its block, so that it can be written and moved alone.

    A `line` is a local float32 buffer with the channels of one position, and zeros up to a multiple of the lanes.
    """

    @abstractmethod
    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Write the line of a position; it may be overwritten meanwhile."""

    @abstractmethod
    def parts(self) -> list[tuple[int, int, int, int]]:
        """Say where in a block a position's elements lie: `(first, slots apart, elements apart, how many)` each."""

    def pack(self, buffer: Any, base: Any, recent: BF16Keys | BF16Values, source: Any, of: Any) -> None:
        """Write position by position."""
        lanes = self.isa.lanes
        padded = -(-self.channels // lanes) * lanes
        line = local(padded, "float32")
        for d in range(self.channels, padded):
            I.buffer_store(line, f32(0.0), [d])
        with I.serial(0, BLOCK) as slot:
            recent.read(source, of, slot, line)
            self.write(buffer, base, slot, line)


class Keys(_Format):
    """A form of keys; an odd last channel is followed by one of zeros."""

    @property
    def pairs(self) -> int:
        """Channel pairs of a key."""
        return -(-self.channels // 2)

    @abstractmethod
    def pair(self, buffer: Any, base: Any, pair: Any, slot: int) -> tuple[Any, Any]:
        """Load both channels of a pair as float32, at as many positions from `slot` as there are lanes."""


class Values(_Format):
    """A form of values."""

    @abstractmethod
    def vector(self, buffer: Any, base: Any, slot: Any, channel: Any, lanes: int) -> Any:
        """Load `lanes` channels of one position as float32."""


class BF16Keys(Keys, ByPosition):
    """A pair of channels in an int32."""

    dtype = "int32"

    @property
    def elements(self) -> int:
        """A pair of a position each."""
        return self.pairs * BLOCK

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Pairs outside, positions inside."""
        return [(0, 1, BLOCK, self.pairs)]

    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Round to nearest even."""
        with I.serial(0, self.pairs) as d:
            high = tirx.shift_left(bf16_bits(line[d * 2 + 1]), i32(16))
            word = tirx.bitwise_or(bf16_bits(line[d * 2]), high)
            I.buffer_store(buffer, word, [base + d * BLOCK + slot])

    def read(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Read the line of a position back."""
        with I.serial(0, self.pairs) as d:
            word = bind(buffer[base + d * BLOCK + slot])
            I.buffer_store(line, as_float(tirx.shift_left(word, i32(16)), 1), [d * 2])
            with I.If(d * 2 + 1 < self.channels), I.Then():
                I.buffer_store(line, as_float(tirx.bitwise_and(word, i32(-65536)), 1), [d * 2 + 1])

    def pair(self, buffer: Any, base: Any, pair: Any, slot: int) -> tuple[Any, Any]:
        """Shift and mask."""
        lanes = self.isa.lanes
        words = bind(load(buffer, base + slot + pair * BLOCK, lanes))
        low = bind(as_float(tirx.shift_left(words, splat(i32(16), lanes)), lanes))
        return low, bind(as_float(tirx.bitwise_and(words, splat(i32(-65536), lanes)), lanes))


class BF16Values(Values, ByPosition):
    """A channel in an int16."""

    dtype = "int16"

    @property
    def elements(self) -> int:
        """A channel of a position each."""
        return self.channels * BLOCK

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Positions outside, channels inside."""
        return [(0, self.channels, 1, self.channels)]

    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Round to nearest even."""
        first = bind(base + slot * self.channels)
        with I.serial(0, self.channels) as d:
            I.buffer_store(buffer, tirx.Cast("int16", bf16_bits(line[d])), [first + d])

    def read(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Read the line of a position back."""
        with I.serial(0, self.channels) as d:
            I.buffer_store(line, self.vector(buffer, base, slot, d, 1), [d])

    def vector(self, buffer: Any, base: Any, slot: Any, channel: Any, lanes: int) -> Any:
        """Widen and shift."""
        words = load(buffer, base + slot * self.channels + channel, lanes)
        wide = tirx.Cast(f"int32x{lanes}" if lanes > 1 else "int32", words)
        return bind(as_float(tirx.shift_left(wide, splat(i32(16), lanes)), lanes))


@dataclass(frozen=True)
class Paged:
    """One layer of a paged cache, and where each row stands.

    `keys` and `values` are buffers in the forms `key_form` and `value_form`, each of `pool` blocks a plane; `blocks`
    int32 holds the tables, `tables` int32 `[rows]` where in it those of each row begin, `positions` int32 `[rows]` each
    row's place in its sequence. First comes how far the table of a plane is from that of the plane before (0: they
    share one), counted from the model's first, of which this cache has those from `first` on. A table begins with
    how many positions of the sequence are not in the cache any more; then come the blocks of those that are, in
    order: its slots. `recent`: the newest blocks in BF16, if others are packed.
    """

    keys: Any
    values: Any
    key_form: Keys
    value_form: Values
    pool: Any
    layer: Any
    blocks: Any
    tables: Any
    positions: Any
    first: int = 0
    recent: Recent | None = None

    def stand(self, plane: Any, row: Any) -> tuple[Any, Any]:
        """Return where the row's table for a plane begins, and the row's slot."""
        begin = bind(self.tables[row])
        table = bind(begin + 1 + (plane + self.first) * self.blocks[begin])
        return table, bind(self.positions[row] - self.blocks[table])

    def block(self, plane: Any, table: Any, index: Any) -> Any:
        """Where block `index` of a table lies in a plane, counted in blocks from the buffer's begin."""
        return plane * self.pool + self.blocks[table + 1 + index]


@dataclass(frozen=True)
class Recent(Paged):
    """The newest blocks of each sequence in BF16: block `index` of it in turn `index % turns`.

    Whoever stands in a block reads that and the `window` blocks before it here, and all before those packed.
    """

    key_form: BF16Keys
    value_form: BF16Values
    window: int = 0
    turns: int = 1

    def block(self, plane: Any, table: Any, index: Any) -> Any:
        """Where block `index` of the sequence with that table lies."""
        # All planes share one table, and before that stands the sequence's number (BlockTables in runtime/blocks.py).
        return plane * self.pool + self.blocks[table - 2] * self.turns + tirx.floormod(index, self.turns)


def by_position(form: Keys | Values) -> ByPosition:
    """Take a form for one whose positions are written and moved alone.

    Raises:
        CodegenError: it only packs whole blocks.
    """
    if not isinstance(form, ByPosition):
        raise CodegenError(
            f"{type(form).__name__} rounds the positions of a block together: none is written or moved alone"
        )
    return form


def as_float(bits: Any, lanes: int) -> Any:
    """Read int32 lanes as the float32 of the same bits."""
    return tirx.reinterpret(f"float32x{lanes}" if lanes > 1 else "float32", bits)

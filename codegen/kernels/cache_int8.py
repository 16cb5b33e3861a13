"""INT8 in a cache: symmetric, one BF16 scale for each key or value of a head; see `int8` of specqd.cache_formats."""

from __future__ import annotations

from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.activations import bf16_bits
from specqd.codegen.kernels.cache import ByPosition, Keys, Values, as_float
from specqd.codegen.tir import I, bind, f32, i32, load, splat, store, tirx
from specqd.manifest import BLOCK

__all__ = ["INT8Keys", "INT8Values", "load_scales", "store_scale"]

_SCALE_BYTES = 2


class INT8Keys(Keys, ByPosition):
    """Channels `[2 * pairs][16]`, then 16 scales."""

    dtype = "int8"

    @property
    def elements(self) -> int:
        """Bytes."""
        return (2 * self.pairs + _SCALE_BYTES) * BLOCK

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Channels outside, positions inside; scales position by position."""
        scales = 2 * self.pairs * BLOCK
        return [(0, 1, BLOCK, 2 * self.pairs), (scales, _SCALE_BYTES, 1, _SCALE_BYTES)]

    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Round by the scale that is kept."""
        store_scale(buffer, base + 2 * self.pairs * BLOCK, slot, _round(self.isa, self.channels, line))
        with I.serial(0, 2 * self.pairs) as d:
            I.buffer_store(buffer, _narrow(line[d]), [base + d * BLOCK + slot])

    def pair(self, buffer: Any, base: Any, pair: Any, slot: int) -> tuple[Any, Any]:
        """Widen two vectors of bytes."""
        lanes = self.isa.lanes
        first = base + slot + pair * (2 * BLOCK)
        return bind(_widen(load(buffer, first, lanes), lanes)), bind(
            _widen(load(buffer, first + BLOCK, lanes), lanes)
        )

    def scales(self, buffer: Any, base: Any, group: Any, slot: int) -> Any:
        """Load the scales of the whole key."""
        return load_scales(buffer, base + 2 * self.pairs * BLOCK, slot, self.isa.lanes)


class INT8Values(Values, ByPosition):
    """Channels `[16][channels]`, then 16 scales."""

    dtype = "int8"

    @property
    def elements(self) -> int:
        """Bytes."""
        return (self.channels + _SCALE_BYTES) * BLOCK

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Both position by position."""
        scales = self.channels * BLOCK
        return [(0, self.channels, 1, self.channels), (scales, _SCALE_BYTES, 1, _SCALE_BYTES)]

    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Round by the scale that is kept."""
        store_scale(buffer, base + self.channels * BLOCK, slot, _round(self.isa, self.channels, line))
        first = bind(base + slot * self.channels)
        with I.serial(0, self.channels) as d:
            I.buffer_store(buffer, _narrow(line[d]), [first + d])

    def vector(self, buffer: Any, base: Any, slot: Any, channel: Any, lanes: int) -> Any:
        """Widen a vector of bytes."""
        return bind(_widen(load(buffer, base + slot * self.channels + channel, lanes), lanes))

    def scales(self, buffer: Any, base: Any, group: Any, slot: int) -> Any:
        """Load the scales of the whole value."""
        return load_scales(buffer, base + self.channels * BLOCK, slot, self.isa.lanes)


def load_scales(buffer: Any, first: Any, slot: int, lanes: int) -> Any:
    """Load the BF16 scales of `lanes` positions from byte `first` of an int8 buffer, as float32."""
    halves = tirx.reinterpret(
        f"int16x{lanes}", load(buffer, first + slot * _SCALE_BYTES, lanes * _SCALE_BYTES)
    )
    return bind(as_float(tirx.shift_left(tirx.Cast(f"int32x{lanes}", halves), splat(i32(16), lanes)), lanes))


def store_scale(buffer: Any, first: Any, slot: Any, bits: Any) -> None:
    """Store the 16 bits of a position's scale, a byte each: neighbours may belong to another thread."""
    for byte in range(_SCALE_BYTES):
        value = tirx.Cast("int8", tirx.shift_right(bits, i32(8 * byte)))
        I.buffer_store(buffer, value, [first + slot * _SCALE_BYTES + byte])


def _round(isa: ISA, channels: int, line: Any) -> Any:
    """Turn a line into integers between -127 and 127, still float32; return the bits of its scale, BF16."""
    lanes = isa.lanes
    size = splat(f32(0.0), lanes)
    for i in range(0, channels, lanes):
        size = tirx.max(size, tirx.abs(load(line, i, lanes)))
    # 2^-126 is the least scale whose reciprocal is finite and which no CPU flushes to zero.
    bits = bind(bf16_bits(bind(tirx.max(isa.reduce("fmax", bind(size)) / f32(127.0), f32(2.0**-126)))))
    inverse = bind(f32(1.0) / as_float(tirx.shift_left(bits, i32(16)), 1))
    for i in range(0, channels, lanes):
        store(line, i, isa.round(bind(load(line, i, lanes) * splat(inverse, lanes))), lanes)
    return bits


def _narrow(x: Any) -> Any:
    return tirx.Cast("int8", tirx.Cast("int32", x))


def _widen(integers: Any, lanes: int) -> Any:
    kinds = ("int32", "float32") if lanes == 1 else (f"int32x{lanes}", f"float32x{lanes}")
    return tirx.Cast(kinds[1], tirx.Cast(kinds[0], integers))

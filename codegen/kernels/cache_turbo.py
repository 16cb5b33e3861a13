"""Rotated keys and values in a cache, as indices of a few levels: `turbo3`, `turbo4`, `turbo5` of specqd.cache_formats.

A code is a sign above the index of a magnitude. Even numbers of bits lie together, in one plane; of odd ones the sign
lies in a plane of its own, after that of the indices. The scale, BF16, belongs to the whole vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.activations import bf16_bits
from specqd.codegen.kernels.cache import ByPosition, Keys, Values, as_float
from specqd.codegen.kernels.cache_int8 import load_scales, store_scale
from specqd.codegen.tir import I, bind, f32, i32, intrinsic, load, local, splat, store, tirx
from specqd.lloyd_max import borders, magnitudes
from specqd.manifest import BLOCK

__all__ = ["TurboKeys", "TurboValues"]

_SCALE_BYTES = 2
_SPAN = 16  # channels of a value whose indices lie together, in one or two words
_SIGNS = 32  # channels whose signs are one word


@dataclass(frozen=True)
class _Turbo(ByPosition):
    dtype = "int8"
    packed = 2
    bits: int

    @property
    def _index(self) -> int:
        """Bits of a code in the first plane."""
        return self.bits & ~1

    @property
    def _bytes(self) -> int:
        """Bytes of a vector's codes."""
        return self.channels * self.bits // 8

    @property
    def _signs(self) -> int:
        """Bytes of a vector's indices: signs come after them, if they lie apart."""
        return self.channels * self._index // 8

    @property
    def elements(self) -> int:
        """Bytes."""
        return (self._bytes + _SCALE_BYTES) * BLOCK

    def scales(self, buffer: Any, base: Any, group: Any, slot: int) -> Any:
        """Load the scales of whole vectors."""
        return load_scales(buffer, base + self._bytes * BLOCK, slot, self.isa.lanes)

    def _encode(self, buffer: Any, base: Any, slot: Any, line: Any) -> Any:
        """Store the scale of a line; return its codes, a local int32 buffer."""
        codes = local(self.channels, "int32")
        store_scale(buffer, base + self._bytes * BLOCK, slot, _encode(self.isa, self.bits, line, codes))
        return codes

    def _magnitudes(self, words: Any, lanes: int) -> Any:
        """Give the levels of the indices in the low bits of int32 lanes, signed if the sign is among those."""
        levels = magnitudes(self.bits)
        return bind(
            self.isa.lookup(words, levels if self.bits % 2 else (*levels, *(-x for x in levels)), lanes)
        )


class TurboKeys(_Turbo, Keys):
    """Bytes `[bytes][16]` of a position's neighbouring channels, first those of indices; then 16 scales."""

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Bytes outside, positions inside; scales position by position."""
        return [(0, 1, BLOCK, self._bytes), (self._bytes * BLOCK, _SCALE_BYTES, 1, _SCALE_BYTES)]

    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Round by the position's own scale."""
        codes = self._encode(buffer, base, slot, line)
        planes = [(0, self._signs, 0, self._index), (self._signs, self._bytes - self._signs, self._index, 1)]
        for first, count, shift, bits in planes:
            with I.serial(0, count) as i:
                byte = _joined(codes, i * (8 // bits), 1, 8 // bits, shift, bits)
                I.buffer_store(buffer, tirx.Cast("int8", byte), [base + (first + i) * BLOCK + slot])

    def pair(self, buffer: Any, base: Any, pair: Any, slot: int) -> tuple[Any, Any]:
        """Look both indices up, and give them their signs."""
        lanes, bits = self.isa.lanes, self._index
        words = bind(self._row(buffer, base, pair * bits // 4, slot))
        if bits == 2:
            words = bind(tirx.shift_right(words, splat(pair % 2 * 4, lanes)))
        low = self._magnitudes(words, lanes)
        high = self._magnitudes(tirx.shift_right(words, splat(i32(bits), lanes)), lanes)
        if self.bits % 2 == 0:
            return low, high
        signs = bind(self._row(buffer, base, self._signs + pair // 4, slot))
        first = bind(tirx.shift_left(signs, splat(i32(31) - pair % 4 * 2, lanes)))
        second = bind(tirx.shift_left(signs, splat(i32(30) - pair % 4 * 2, lanes)))
        return _signed(low, first, lanes), _signed(high, second, lanes)

    def _row(self, buffer: Any, base: Any, row: Any, slot: int) -> Any:
        lanes = self.isa.lanes
        bytes_ = tirx.reinterpret(f"uint8x{lanes}", load(buffer, base + row * BLOCK + slot, lanes))
        return tirx.Cast(f"int32x{lanes}", bytes_)


class TurboValues(_Turbo, Values):
    """Words `[16][words]`, first those of indices; then 16 scales.

    With 2 bits an index, 16 channels are a word; with 4, two words, and neighbouring channels take turns.
    """

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Both position by position."""
        return [(0, self._bytes, 1, self._bytes), (self._bytes * BLOCK, _SCALE_BYTES, 1, _SCALE_BYTES)]

    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Round by the position's own scale."""
        codes = self._encode(buffer, base, slot, line)
        first, words = bind(base + slot * self._bytes), self._index // 2
        with I.serial(0, self.channels // _SPAN) as i:
            for word in range(words):
                bits = _joined(codes, i * _SPAN + word, words, _SPAN // words, 0, self._index)
                _store_word(buffer, first + (i * words + word) * 4, bits)
        if self.bits % 2:
            with I.serial(0, self.channels // _SIGNS) as i:
                bits = _joined(codes, i * _SIGNS, 1, _SIGNS, self._index, 1)
                _store_word(buffer, first + self._signs + i * 4, bits)

    def vector(self, buffer: Any, base: Any, slot: Any, channel: Any, lanes: int) -> Any:
        """Give each lane the word that it lies in, shift, and look up."""
        words, first = self._index // 2, base + slot * self._bytes
        group = load(buffer, first + channel // _SPAN * (4 * words), 4 * words)
        whole = tirx.reinterpret(f"int{32 * words}", group)
        spread = tirx.reinterpret(f"int32x{lanes}", splat(whole, lanes // words))
        within = splat(channel % _SPAN // 8 * 16, lanes)
        shifts = _lanes([lane // words * self._index for lane in range(lanes)]) + within
        level = self._magnitudes(tirx.shift_right(spread, shifts), lanes)
        if self.bits % 2 == 0:
            return level
        word = tirx.reinterpret("int32", load(buffer, first + self._signs + channel // _SIGNS * 4, 4))
        up = _lanes([31 - lane for lane in range(lanes)]) - splat(channel % _SIGNS, lanes)
        return _signed(level, tirx.shift_left(splat(word, lanes), up), lanes)


def _encode(isa: ISA, bits: int, line: Any, codes: Any) -> Any:
    """Find the codes of a line; return the bits of its scale, BF16.

    Sums are in float64, where products are exact and their order hardly matters: every instruction set gets the same.
    """
    lanes, steps = isa.lanes, int(codes.shape[0]) // isa.lanes
    sums = [_Sum(lanes) for _ in range(3)]
    with I.serial(0, steps) as i:
        sums[0].add(load(line, i * lanes, lanes), load(line, i * lanes, lanes))
    mean = bind(sums[0].total() / tirx.const(steps * lanes, "float64"))
    least, one = (tirx.const(x, "float64") for x in (2.0**-126, 1.0))
    inverse = bind(tirx.Cast("float32", one / tirx.max(tirx.sqrt(mean), least)))
    index = local(lanes, "int32")
    with I.serial(0, steps) as i:
        size = bind(tirx.abs(load(line, i * lanes, lanes)))
        unit = bind(size * splat(inverse, lanes))
        store(index, 0, splat(i32(0), lanes), lanes)
        for border in borders(bits):  # kept in a buffer: TVM takes minutes to simplify one long expression
            beyond = tirx.Select(unit > splat(f32(border), lanes), splat(i32(1), lanes), splat(i32(0), lanes))
            store(index, 0, load(index, 0, lanes) + beyond, lanes)
        level = bind(isa.lookup(load(index, 0, lanes), magnitudes(bits), lanes))
        sums[1].add(level, size)
        sums[2].add(level, level)
        sign = tirx.reinterpret(f"uint32x{lanes}", load(line, i * lanes, lanes))
        sign = tirx.Cast(f"int32x{lanes}", tirx.shift_right(sign, splat(tirx.const(31, "uint32"), lanes)))
        code = tirx.bitwise_or(load(index, 0, lanes), tirx.shift_left(sign, splat(i32(bits - 1), lanes)))
        store(codes, i * lanes, code, lanes)
    return bind(bf16_bits(bind(tirx.Cast("float32", sums[1].total() / sums[2].total()))))


class _Sum:
    """A sum of products of float32 lanes, in float64."""

    def __init__(self, lanes: int) -> None:
        self.lanes, self.kind = lanes, f"float64x{lanes}"
        self.sums = local(lanes, "float64")
        store(self.sums, 0, splat(tirx.const(0.0, "float64"), lanes), lanes)

    def add(self, a: Any, b: Any) -> None:
        product = tirx.Cast(self.kind, a) * tirx.Cast(self.kind, b)
        store(self.sums, 0, load(self.sums, 0, self.lanes) + product, self.lanes)

    def total(self) -> Any:
        zero = tirx.const(0.0, "float64")
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f64"
        return bind(intrinsic("float64", name, zero, load(self.sums, 0, self.lanes)))


def _joined(codes: Any, first: Any, step: int, count: int, shift: int, bits: int) -> Any:
    """Put `bits` from bit `shift` on of every `step`-th code into a word, the first lowest."""
    word = local(1, "int32")
    I.buffer_store(word, i32(0), [0])
    with I.serial(0, count) as i:
        code = tirx.bitwise_and(tirx.shift_right(codes[first + i * step], i32(shift)), i32((1 << bits) - 1))
        I.buffer_store(word, tirx.bitwise_or(word[0], tirx.shift_left(code, i * bits)), [0])
    return bind(word[0])


def _store_word(buffer: Any, at: Any, word: Any) -> None:
    store(buffer, at, tirx.reinterpret("int8x4", word), 4)


def _lanes(numbers: list[int]) -> Any:
    return tirx.Shuffle([i32(n) for n in numbers], list(range(len(numbers))))


def _signed(x: Any, signs: Any, lanes: int) -> Any:
    """Give magnitudes the highest bit of int32 lanes as their sign."""
    sign = tirx.bitwise_and(signs, splat(i32(-(2**31)), lanes))
    bits = tirx.reinterpret(f"int32x{lanes}", x)
    return bind(as_float(tirx.bitwise_or(bits, sign), lanes))

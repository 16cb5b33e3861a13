"""INT4 in a cache, asymmetric: keys by channel over the positions of a block, values by position (KIVI).

The zero point is the least of the numbers, in BF16 as they are, the scale a fifteenth of their range, and both lie in
one word: the scale in its low half. See `int4` of specqd.cache_formats.
"""

from __future__ import annotations

from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.activations import bf16_bits
from specqd.codegen.kernels.cache import BF16Keys, BF16Values, ByPosition, Keys, Values, as_float
from specqd.codegen.tir import I, bind, f32, i32, intrinsic, load, local, splat, store, tirx
from specqd.manifest import BLOCK

__all__ = ["INT4Keys", "INT4Values"]

_WORDS = BLOCK // 4  # of the numbers of a pair of channels: a byte a position
_SPAN = 32  # channels of a position that lie together: the first half in low bits of 16 bytes


class INT4Keys(Keys):
    """Pairs of channels `[pairs][16]` in bytes, the even one in the low bits; then a word of scale and zero each."""

    dtype = "int32"

    @property
    def elements(self) -> int:
        """Words."""
        return self.pairs * (_WORDS + 2)

    def pack(self, buffer: Any, base: Any, recent: BF16Keys | BF16Values, source: Any, of: Any) -> None:
        """Round each channel by its own scale."""
        assert isinstance(recent, BF16Keys)
        lanes = self.isa.lanes
        with I.serial(0, self.pairs) as d:
            vectors = [recent.pair(source, of, d, slot) for slot in range(0, BLOCK, lanes)]
            rounded = []
            for i in range(2):
                channel = [pair[i] for pair in vectors]
                low, inverse, word = _range(self.isa, channel)
                I.buffer_store(buffer, word, [base + self.pairs * _WORDS + d * 2 + i])
                rounded.append([_round(self.isa, x, low, inverse) for x in channel])
            for at, (even, odd) in enumerate(zip(*rounded, strict=True)):
                both = tirx.bitwise_or(even, tirx.shift_left(odd, splat(i32(4), lanes)))
                words = tirx.reinterpret(f"int32x{lanes // 4}", tirx.Cast(f"int8x{lanes}", both))
                store(buffer, base + d * _WORDS + at * (lanes // 4), words, lanes // 4)

    def pair(self, buffer: Any, base: Any, pair: Any, slot: int) -> tuple[Any, Any]:
        """Widen a vector of bytes, and scale both halves."""
        lanes = self.isa.lanes
        words = load(buffer, base + pair * _WORDS + slot // 4, lanes // 4)
        both = bind(tirx.Cast(f"int32x{lanes}", tirx.reinterpret(f"uint8x{lanes}", words)))
        halves = (tirx.bitwise_and(both, splat(i32(15), lanes)), tirx.shift_right(both, splat(i32(4), lanes)))
        scales = (bind(buffer[base + self.pairs * _WORDS + pair * 2 + i]) for i in range(2))
        low, high = (bind(_scaled(self.isa, x, word)) for x, word in zip(halves, scales, strict=True))
        return low, high


class INT4Values(Values, ByPosition):
    """Bytes `[16][spans][16]`, of each 32 channels the first 16 in the low bits; then 16 words of scale and zero."""

    dtype = "int32"
    packed = 8

    @property
    def _words(self) -> int:
        """Words of a position's numbers."""
        return -(-self.channels // _SPAN) * (_SPAN // 8)

    @property
    def elements(self) -> int:
        """Words."""
        return (self._words + 1) * BLOCK

    def parts(self) -> list[tuple[int, int, int, int]]:
        """Words of a position, and its scale."""
        return [(0, self._words, 1, self._words), (self._words * BLOCK, 1, 1, 1)]

    def write(self, buffer: Any, base: Any, slot: Any, line: Any) -> None:
        """Round by the position's own scale."""
        lanes = self.isa.lanes
        padded = -(-self.channels // lanes) * lanes
        for d in range(self.channels, padded):
            I.buffer_store(line, line[0], [d])  # which changes no range
        low, inverse, word = _range(self.isa, [load(line, d, lanes) for d in range(0, padded, lanes)])
        I.buffer_store(buffer, word, [base + self._words * BLOCK + slot])
        numbers = local(self._words * 8, "int32")
        for d in range(0, self._words * 8, lanes):
            x = _round(self.isa, load(line, d, lanes), low, inverse) if d < padded else splat(i32(0), lanes)
            store(numbers, d, x, lanes)
        for word in range(self._words):
            first = word // 4 * _SPAN + word % 4 * 4
            total = i32(0)
            for byte in range(4):
                for half, shift in ((0, 0), (_SPAN // 2, 4)):
                    number = numbers[first + half + byte]
                    total = tirx.bitwise_or(total, tirx.shift_left(number, i32(8 * byte + shift)))
            I.buffer_store(buffer, total, [base + slot * self._words + word])

    def vector(self, buffer: Any, base: Any, slot: Any, channel: Any, lanes: int) -> Any:
        """Widen a vector of bytes, shift to the half that holds the channels, and scale."""
        half = _SPAN // 2
        place = base + slot * self._words + (channel // _SPAN) * (_SPAN // 8) + (channel % half) // 4
        shift = (channel // half) % 2 * 4
        scale = buffer[base + self._words * BLOCK + slot]
        if lanes < 4:
            first = (channel % 4) * 8 + shift
            numbers = tirx.shift_right(
                splat(buffer[place], lanes), tirx.Ramp(first, 8, lanes) if lanes > 1 else first
            )
            return bind(
                _scaled(self.isa, tirx.bitwise_and(numbers, splat(i32(15), lanes)), bind(scale), lanes)
            )
        bytes_ = tirx.reinterpret(f"uint8x{lanes}", load(buffer, place, lanes // 4))
        numbers = tirx.shift_right(tirx.Cast(f"int32x{lanes}", bytes_), splat(shift, lanes))
        return bind(_scaled(self.isa, tirx.bitwise_and(numbers, splat(i32(15), lanes)), bind(scale), lanes))


def _range(isa: ISA, vectors: list[Any]) -> tuple[Any, Any, Any]:
    """Return the least of some vectors' lanes, one over the scale, and the word that holds both."""
    lowest, highest = vectors[0], vectors[0]
    for x in vectors[1:]:
        lowest, highest = tirx.min(lowest, x), tirx.max(highest, x)
    low, high = bind(isa.reduce("fmin", bind(lowest))), bind(isa.reduce("fmax", bind(highest)))
    # 2^-126 is the least scale whose reciprocal is finite and which no CPU flushes to zero.
    scale = bind(bf16_bits(bind(tirx.max((high - low) / f32(15.0), f32(2.0**-126)))))
    inverse = bind(f32(1.0) / as_float(tirx.shift_left(scale, i32(16)), 1))
    return low, inverse, tirx.bitwise_or(scale, tirx.shift_left(bf16_bits(low), i32(16)))


def _round(isa: ISA, x: Any, low: Any, inverse: Any) -> Any:
    """Turn lanes into integers from 0 to 15."""
    apart = bind(x - splat(low, isa.lanes))
    return bind(tirx.Cast(f"int32x{isa.lanes}", isa.round(bind(apart * splat(inverse, isa.lanes)))))


def _scaled(isa: ISA, numbers: Any, word: Any, lanes: int = 0) -> Any:
    """Give integers back as float32, by the word of their scale and zero point."""
    lanes = lanes or isa.lanes
    kind = f"float32x{lanes}" if lanes > 1 else "float32"
    scale = as_float(tirx.shift_left(word, i32(16)), 1)
    zero = as_float(tirx.bitwise_and(word, i32(-65536)), 1)
    return intrinsic(kind, "llvm.fmuladd", tirx.Cast(kind, numbers), splat(scale, lanes), splat(zero, lanes))

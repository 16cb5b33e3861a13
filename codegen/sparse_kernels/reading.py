"""Reads a matrix with zeros: its elements from memory in order, each vector expanded to what the dense layout holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specqd.codegen.tir import I, i32, intrinsic, load, local, prefetch, splat, tirx

from .formats import VECTOR, Format

__all__ = ["Reader", "Sparse"]

#: bytes that values are asked for ahead: a page, where the CPU's own prefetch stops
_AHEAD = 4096


@dataclass(frozen=True)
class Sparse:
    """A stored matrix as a kernel sees it: the buffers of `formats.Stored`, and the first element of each.

    `bits` of an element: 8, 16 or 32.
    """

    form: Format
    bits: int
    buffers: tuple[Any, Any, Any]
    offsets: tuple[Any, Any, Any]

    def reader(self, block: Any) -> Reader:
        """Begin to read a block."""
        return Reader(self, block)


class Reader:
    """One pass over a block, vector by vector; where it stands is a variable of the compiled code."""

    def __init__(self, matrix: Sparse, block: Any) -> None:
        self._matrix = matrix
        self._at = local(1, "int32")
        I.buffer_store(self._at, matrix.buffers[2][matrix.offsets[2] + block], [0])

    def vectors(self, first: Any, count: int) -> list[Any]:
        """Read the next `count` vectors, the first of which is the matrix's `first`: int8, int16 or int32 lanes."""
        m = self._matrix
        at = I.bind(self._at[0])
        lanes, read = VECTOR * 8 // m.bits, []
        masks = [self._mask(first + i) for i in range(count)]
        for mask, bits, there in masks:
            packed = load(m.buffers[0], m.offsets[0] + at, lanes)
            prefetch(m.buffers[0], m.offsets[0] + at + _AHEAD * 8 // m.bits)
            read.append(I.bind(self._expanded(packed, mask, bits)))
            at = I.bind(at + there)
        I.buffer_store(self._at, at, [0])
        return read

    def pairs(self, first: Any, count: int) -> list[Any]:
        """Read the next `count` pairs of vectors of codes of four bits: bytes, the code in the low half."""
        m = self._matrix
        at = I.bind(self._at[0])
        low = splat(tirx.const(0x0F0F0F0F, "int32"), 16)
        read = []
        for i in range(count):
            masks = [self._mask(first + 2 * i + half) for half in (0, 1)]
            packed = I.bind(tirx.reinterpret("int32x16", load(m.buffers[0], m.offsets[0] + at, VECTOR)))
            prefetch(m.buffers[0], m.offsets[0] + at + _AHEAD)
            for half, (mask, bits, _) in zip(
                (packed, tirx.shift_right(packed, splat(i32(4), 16))), masks, strict=True
            ):
                codes = tirx.reinterpret("int8x64", tirx.bitwise_and(half, low))
                read.append(I.bind(self._expanded(codes, mask, bits)))
            at = I.bind(at + tirx.max(masks[0][2], masks[1][2]))
        I.buffer_store(self._at, at, [0])
        return read

    def _mask(self, vector: Any) -> tuple[Any, int, Any]:
        """Return a vector's mask, the bits of the elements that it is of, and how many elements it lets through."""
        m = self._matrix
        stored = I.bind(m.buffers[1][m.offsets[1] + vector])
        inputs = 32 // m.bits
        if m.form.name == "column":
            wide = 16 * inputs
            ones = sum(1 << (inputs * channel) for channel in range(16))
            spread = I.bind(tirx.Cast(f"int{wide}", stored) * tirx.const(_signed(ones, wide), f"int{wide}"))
            return spread, m.bits, tirx.popcount(tirx.Cast("int32", stored)) * 16
        if m.form.name == "lane":
            return stored, 32, tirx.popcount(tirx.Cast("int32", stored)) * inputs
        return (
            stored,
            m.bits,
            tirx.Cast("int32", intrinsic(f"int{16 * inputs}", f"llvm.ctpop.i{16 * inputs}", stored)),
        )

    def _expanded(self, packed: Any, mask: Any, bits: int) -> Any:
        m = self._matrix
        of_bits, asked = (f"int{size}x{VECTOR * 8 // size}" for size in (bits, m.bits))
        wide = tirx.call_pure_extern(
            of_bits, f"specqd_expand_{bits}", tirx.reinterpret(of_bits, packed), mask
        )
        return tirx.reinterpret(asked, wide)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value

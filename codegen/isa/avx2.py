"""AVX2 with FMA (x86-64-v3): BF16 by shift and mask, integer dots by PMADDUBSW and PMADDWD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, f32, i32, intrinsic, splat, tirx

__all__ = ["AVX2", "floats"]

_E2M1 = [0, 1, 2, 3, 4, 6, 8, 12]
TABLE = [12 + v for v in _E2M1] + [12 - v for v in _E2M1]


def floats(table: Sequence[float], lanes: int) -> Any:
    """Fill a vector with a table, as often as it fits."""
    values = [f32(x) for x in table] * (lanes // len(table))
    return tirx.Shuffle(values, list(range(lanes)))


class AVX2(ISA):
    """Sixteen 256-bit registers; two FMA pipes on every CPU that has it."""

    name = "avx2"
    mcpu = "x86-64-v3"
    features: tuple[str, ...] = ("avx2", "fma", "f16c", "bmi2")

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """`a * b + c` with one rounding."""
        return intrinsic(f"float32x{self.lanes}", f"llvm.fma.v{self.lanes}f32", a, b, c)

    def round(self, x: Any) -> Any:
        """VROUNDPS; said as such, so that no product is fused into it."""
        return tirx.nearbyint(x)

    def e2m1_table(self) -> Any:
        """Build the 16-entry byte table of VPSHUFB in both halves of a register."""
        words = [sum(TABLE[4 * i + j] << (8 * j) for j in range(4)) for i in range(4)]
        vector = [tirx.const(w, "int32") for w in words] * (self.lanes // 4)
        return I.bind(
            tirx.reinterpret(f"int8x{self.lanes * 4}", tirx.Shuffle(vector, list(range(self.lanes))))
        )

    def e2m1(self, codes: Any, table: Any) -> Any:
        """Look codes up with VPSHUFB."""
        return intrinsic(f"int8x{self.lanes * 4}", "llvm.x86.avx2.pshuf.b", table, codes)

    def lookup(self, indices: Any, table: Sequence[float], lanes: int) -> Any:
        """VPERMPS, which goes by the low three bits of an index."""
        if lanes != 8:
            return super().lookup(indices, table, lanes)
        name, kind = "llvm.x86.avx2.permps", "float32x8"
        halves = [
            intrinsic(kind, name, floats(table[at : at + 8], 8), indices) for at in range(0, len(table), 8)
        ]
        if len(halves) == 1:
            return halves[0]
        eight = splat(i32(8), 8)
        return tirx.Select(tirx.bitwise_and(indices, eight) == eight, halves[1], halves[0])

    def _widen(self, products: Any) -> Any:
        ones = splat(tirx.const(1, "int16"), 16)
        return intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", products, ones)

    def dot_unsigned(self, acc: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """PMADDUBSW, four at a time in 16 bits: 4 * 2 * 24 * 127 = 24384 cannot saturate."""
        for start in range(0, len(pairs), 4):
            total = None
            for w, x in pairs[start : start + 4]:
                term = self._multiply(w, x)
                total = term if total is None else total + term
            acc = acc + self._widen(total)
        return acc

    def dot_signed(self, acc: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """|x| as the unsigned operand, the sign moved to w: 2 * 127 * 127 = 32258 cannot saturate."""
        for w, x in pairs:
            acc = acc + self._widen(self._multiply(self._with_sign_of(x, x), self._with_sign_of(w, x)))
        return acc

    def dot_bytes(self, acc: Any, x: Any, w: Any) -> Any:
        """PMADDWD on even and odd bytes, because PMADDUBSW would saturate: 2 * 255 * 127 is above 2^15."""
        n = self.lanes * 2
        eight = splat(tirx.const(8, "int16"), n)
        wide_x, wide_w = (tirx.reinterpret(f"int16x{n}", v) for v in (x, w))
        low = splat(tirx.const(255, "int16"), n)
        even = tirx.bitwise_and(wide_x, low), tirx.shift_right(tirx.shift_left(wide_w, eight), eight)
        odd = tirx.bitwise_and(tirx.shift_right(wide_x, eight), low), tirx.shift_right(wide_w, eight)
        return acc + self._pairs(*even) + self._pairs(*odd)

    def multiply_short(self, acc: Any, x: Any, w: Any) -> Any:
        """PMADDWD with nothing beside `w`: PMULLD takes twice as long or more."""
        low = tirx.bitwise_and(w, splat(i32(0xFFFF), self.lanes))
        return acc + self._pairs(*(tirx.reinterpret(f"int16x{self.lanes * 2}", v) for v in (x, low)))

    def _pairs(self, a: Any, b: Any) -> Any:
        return intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)

    def _multiply(self, unsigned: Any, signed: Any) -> Any:
        return intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)

    def _with_sign_of(self, values: Any, x: Any) -> Any:
        return intrinsic("int8x32", "llvm.x86.avx2.psign.b", values, x)

"""ISA: what a kernel may ask of an instruction set; this base is correct on any LLVM target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specqd.codegen.maths import ROUNDER
from specqd.codegen.tir import I, f32, i32, intrinsic, splat, tirx

__all__ = ["ISA"]


class ISA:
    """The generic instruction set: plain vector arithmetic that LLVM legalises for any target.

    `lanes` is the float32 vector width kernels use, `accumulators` how many such vectors fit in registers beside
    their operands, `features` the CPU flags (as in /proc/cpuinfo) without which the code must not run.
    """

    name = "generic"
    mcpu = ""
    attributes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    lanes = 8
    accumulators = 10
    #: vector registers there are, for kernels that plan all of them
    registers = 16
    #: what a BF16 kernel reads its activations as: float32, or pairs of BF16 in one int32
    pairs = False
    #: BF16 matrices are multiplied in tiles (codegen/kernels/tiles.py)
    tiles = False
    #: the prelude has `specqd_expand_BITS`, which reads vectors from their elements and a mask (codegen/sparse_kernels)
    expands = False
    #: integer kernels add this times sum(x) for weights that were not shifted to unsigned
    signed_correction = 0
    #: LLVM IR text that kernels call into
    prelude = ""

    def target(self) -> dict[str, Any]:
        """Describe the LLVM target for `tvm.target.Target`."""
        spec: dict[str, Any] = {"kind": "llvm"}
        if self.mcpu:
            spec["mcpu"] = self.mcpu
        if self.attributes:
            spec["mattr"] = list(self.attributes)
        return spec

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """`a * b + c`: two roundings here, one where the CPU has the instruction."""
        return a * b + c

    def round(self, x: Any) -> Any:
        """Round lanes below 2^22 to the nearest integer, ties to even."""
        # A sum as such TVM would cancel against the difference.
        one, rounder = (splat(f32(value), self.lanes) for value in (1.0, ROUNDER))
        return intrinsic(f"float32x{self.lanes}", "llvm.fmuladd", x, one, rounder) - rounder

    def bf16_prepare(self, weights: Any) -> Any:
        """Prepare BF16 pairs (int32 lanes) once for several rows; what it returns goes to `bf16_dot`."""
        n = self.lanes
        low = tirx.reinterpret(f"float32x{n}", tirx.shift_left(weights, splat(i32(16), n)))
        high = tirx.reinterpret(f"float32x{n}", tirx.bitwise_and(weights, splat(i32(-65536), n)))
        return I.bind(low), I.bind(high)

    def bf16_dot(self, acc: Any, prepared: Any, x: Any) -> Any:
        """Add `w[2j] * x_even`, then `w[2j + 1] * x_odd`, to `acc`, lane by lane."""
        low, high = prepared
        even, odd = x
        return self.fma(high, splat(odd, self.lanes), self.fma(low, splat(even, self.lanes), acc))

    def e2m1_table(self) -> Any:
        """Set up whatever `e2m1` needs, once a task."""
        return None

    def e2m1(self, codes: Any, _table: Any) -> Any:
        """Turn int8 lanes holding E2M1 codes 0..15 into int8 lanes holding `2 * value + 12` (0..24)."""
        n = self.lanes * 4
        one, two, seven, eight = (splat(tirx.const(v, "int8"), n) for v in (1, 2, 7, 8))
        code = tirx.bitwise_and(codes, seven)
        half = tirx.shift_right(code, one)
        big = tirx.shift_left(
            two + tirx.bitwise_and(code, one), tirx.max(half - one, half * tirx.const(0, "int8"))
        )
        size = tirx.Select(code < two, code, big)
        twelve = splat(tirx.const(12, "int8"), n)
        return tirx.Select(tirx.bitwise_and(codes, eight) == eight, twelve - size, twelve + size)

    def lookup(self, indices: Any, table: Sequence[float], lanes: int) -> Any:
        """Give the float32 that the low bits of each of `lanes` int32 lanes point to in a table of 4, 8 or 16."""
        values = [splat(f32(value), lanes) for value in table]
        bit = 1
        while len(values) > 1:
            is_set = tirx.bitwise_and(indices, splat(i32(bit), lanes)) != splat(i32(0), lanes)
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [I.bind(tirx.Select(is_set, odd, even)) for even, odd in pairs]
            bit *= 2
        return values[0]

    def dot_unsigned(self, acc: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """Add, per int32 lane, four products each of u8 weights (at most 24) and s8 activations, for all pairs."""
        return self._dot(acc, pairs)

    def dot_signed(self, acc: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """Add, per int32 lane, four products each of s8 weights and s8 activations, none of them -128."""
        return self._dot(acc, pairs)

    def _dot(self, acc: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        n = self.lanes
        for w, x in pairs:
            for byte in range(4):
                acc = acc + self._byte(w, byte, n) * self._byte(x, byte, n)
        return acc

    def dot_bytes(self, acc: Any, x: Any, w: Any) -> Any:
        """Add, per int32 lane, four products of u8 activations and s8 weights, exactly."""
        n = self.lanes
        for byte in range(4):
            signed = self._byte(x, byte, n)
            acc = acc + tirx.bitwise_and(signed, splat(i32(255), n)) * self._byte(w, byte, n)
        return acc

    def multiply_short(self, acc: Any, x: Any, w: Any) -> Any:
        """Add, per int32 lane, one product of numbers that 16 bits hold, signs and all."""
        return acc + x * w

    @staticmethod
    def _byte(v: Any, byte: int, lanes: int) -> Any:
        words = tirx.reinterpret(f"int32x{lanes}", v)
        return tirx.shift_right(
            tirx.shift_left(words, splat(i32(24 - 8 * byte), lanes)), splat(i32(24), lanes)
        )

    def reduce(self, kind: str, vector: Any) -> Any:
        """Fold the lanes of a float32 or int32 vector in a fixed order: `fmax`, `fadd` or `add`."""
        n = self.lanes
        dtype = "int32" if kind == "add" else "float32"
        name = f"llvm.vector.reduce.{kind}.v{n}{'i32' if kind == 'add' else 'f32'}"
        if kind == "fadd":
            return intrinsic(dtype, name, tirx.const(0.0, "float32"), vector)
        return intrinsic(dtype, name, vector)

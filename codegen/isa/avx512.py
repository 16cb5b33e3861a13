"""AVX-512: VPDPBUSD for integers, and VDPBF16PS for BF16 where the CPU has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specqd.codegen.isa.avx2 import AVX2, floats
from specqd.codegen.tir import I, intrinsic, splat, tirx

__all__ = ["AMX", "AVX512", "AVX512BF16"]


def _expansion(bits: int) -> str:
    """Define `specqd_expand_BITS(vector, mask)`: the first elements where the mask has ones, zeros elsewhere.

    VPEXPANDB, VPEXPANDW or VPEXPANDD.
    """
    lanes = 512 // bits
    vector, call = f"<{lanes} x i{bits}>", f"@llvm.x86.avx512.mask.expand.v{lanes}i{bits}"
    return f"""
declare {vector} {call}({vector}, {vector}, <{lanes} x i1>)
define {vector} @specqd_expand_{bits}({vector} %packed, i{lanes} %mask) alwaysinline {{
  %where = bitcast i{lanes} %mask to <{lanes} x i1>
  %r = call {vector} {call}({vector} %packed, {vector} zeroinitializer, <{lanes} x i1> %where)
  ret {vector} %r
}}
"""


class AVX512(AVX2):
    """Thirty-two 512-bit registers (x86-64-v4), without BF16 or VNNI."""

    name = "avx512"
    mcpu = "x86-64-v4"
    features: tuple[str, ...] = (*AVX2.features, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
    lanes = 16
    accumulators = 20
    registers = 32

    def e2m1(self, codes: Any, table: Any) -> Any:
        """Look codes up with VPSHUFB."""
        return intrinsic("int8x64", "llvm.x86.avx512.pshuf.b.512", table, codes)

    def lookup(self, indices: Any, table: Sequence[float], lanes: int) -> Any:
        """VPERMPS, which goes by the low four bits of an index."""
        if lanes != 16:
            return super().lookup(indices, table, lanes)
        return intrinsic("float32x16", "llvm.x86.avx512.permvar.sf.512", floats(table, 16), indices)

    def _widen(self, products: Any) -> Any:
        ones = splat(tirx.const(1, "int16"), 32)
        return intrinsic("int32x16", "llvm.x86.avx512.pmaddw.d.512", products, ones)

    def _pairs(self, a: Any, b: Any) -> Any:
        return intrinsic("int32x16", "llvm.x86.avx512.pmaddw.d.512", a, b)

    def _multiply(self, unsigned: Any, signed: Any) -> Any:
        return intrinsic("int16x32", "llvm.x86.avx512.pmaddubs.w.512", unsigned, signed)

    def _with_sign_of(self, values: Any, x: Any) -> Any:
        zero = splat(tirx.const(0, "int8"), 64)
        return tirx.Select(x < zero, zero - values, values)


class AVX512BF16(AVX512):
    """Zen 4, Sapphire Rapids and later: BF16 pairs and bytes multiplied in one instruction each, vectors expanded."""

    name = "avx512_bf16"
    attributes: tuple[str, ...] = ("+avx512bf16", "+avx512vnni", "+avx512vbmi2")
    features: tuple[str, ...] = (*AVX512.features, "avx512_bf16", "avx512_vnni", "avx512_vbmi2")
    pairs = True
    expands = True
    #: weights are shifted by 128 to be unsigned, so 128 * sum(x) comes off
    signed_correction = -128
    #: a TIR call cannot carry BF16 types or masks, so such instructions come as functions of LLVM IR, inlined
    prelude = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @specqd_dpbf16ps(<16 x float> %acc, <16 x i32> %w, i32 %x) alwaysinline {
  %one = insertelement <16 x i32> poison, i32 %x, i64 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %a = bitcast <16 x i32> %w to <32 x bfloat>
  %b = bitcast <16 x i32> %all to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}
""" + "".join(map(_expansion, (8, 16, 32)))

    def bf16_prepare(self, weights: Any) -> Any:
        """Keep the pairs as they are."""
        return I.bind(weights)

    def bf16_dot(self, acc: Any, prepared: Any, x: Any) -> Any:
        """VDPBF16PS: both products of a pair, with `x` two BF16 in an int32."""
        return tirx.call_pure_extern("float32x16", "specqd_dpbf16ps", acc, prepared, x)

    def dot_unsigned(self, acc: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """VPDPBUSD, four products a lane."""
        for w, x in pairs:
            acc = self.dot_bytes(acc, w, x)
        return acc

    def dot_bytes(self, acc: Any, x: Any, w: Any) -> Any:
        """VPDPBUSD."""
        return intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, x, w)

    def dot_signed(self, acc: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """VPDPBUSD on `w + 128`; see `signed_correction`."""
        flip = splat(tirx.const(-128, "int8"), 64)
        return self.dot_unsigned(acc, [(tirx.bitwise_xor(w, flip), x) for w, x in pairs])


class AMX(AVX512BF16):
    """Sapphire Rapids and later: BF16 matrices in tiles, the rest as AVX-512 with BF16."""

    name = "amx"
    mcpu = "sapphirerapids"
    tiles = True
    attributes: tuple[str, ...] = ()
    features: tuple[str, ...] = (*AVX512BF16.features, "amx_bf16", "amx_tile", "amx_int8")

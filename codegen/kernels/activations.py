"""Turn a value into the operand a matrix kernel reads: float32 rows, BF16 pairs, or INT8 in blocks of 32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.integer import GROUP
from specqd.codegen.tir import I, f32, i32, load, local, parallel, splat, store, tirx

__all__ = ["bf16_bits", "quantise"]


def bf16_bits(x: Any) -> Any:
    """Round a float32 expression to BF16, nearest even; the bits lie in the low half of an int32."""
    bits = tirx.reinterpret("int32", x)
    upper = tirx.shift_right(bits, i32(16))
    rounded = tirx.shift_right(bits + tirx.bitwise_and(upper, i32(1)) + i32(0x7FFF), i32(16))
    return tirx.bitwise_and(rounded, i32(0xFFFF))


def quantise(
    isa: ISA,
    rows: int,
    k: int,
    fill: Callable[[Any, Any, Any], None],
    out: tuple[Any, Any, Any],
    phase: Any,
    space: Any,
) -> None:
    """Emit one phase rounding `[rows, k]` to INT8, symmetric, amax / 127 a block of 32.

    `fill(row, first column, local float32[32])` computes one block; `space` learns the loop's range. `out` is
    (values int32 `[rows, k/4]`, scales float32 `[rows, k/32]`, sums int32 `[rows, k/32]`).
    """
    lanes, groups = isa.lanes, k // GROUP
    values, scales, sums = out
    with phase(), parallel(rows * groups) as u:
        space.bound(u, rows * groups)
        block = local(GROUP, "float32")
        fill(space.simplify(u // groups), space.simplify((u % groups) * GROUP), block)
        size = splat(f32(0.0), lanes)
        for i in range(0, GROUP, lanes):
            size = tirx.max(size, tirx.abs(load(block, i, lanes)))
        amax = I.bind(isa.reduce("fmax", I.bind(size)))
        inverse = I.bind(tirx.Select(amax > f32(0.0), f32(127.0) / tirx.max(amax, f32(1e-30)), f32(0.0)))
        total = splat(i32(0), lanes)
        for i in range(0, GROUP, lanes):
            scaled = isa.round(I.bind(load(block, i, lanes) * splat(inverse, lanes)))
            q = I.bind(tirx.Cast(f"int32x{lanes}", scaled))
            packed = tirx.reinterpret(f"int32x{lanes // 4}", tirx.Cast(f"int8x{lanes}", q))
            store(values, u * (GROUP // 4) + i // 4, packed, lanes // 4)
            total = total + q
        I.buffer_store(sums, isa.reduce("add", I.bind(total)), [u])
        I.buffer_store(scales, amax * f32(1 / 127), [u])

"""Multiply and add in registers as fast as the CPU can: the yardstick of every kernel that is bound by arithmetic."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder

from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, f32, load, local, parallel, splat, store, tirx

__all__ = ["STEPS", "multiply_add", "multiply_add_flops"]

STEPS = 100_000
"""Rounds of one call."""


def multiply_add(isa: ISA, threads: int) -> Any:
    """Return the PrimFunc `multiply_add(out float32[threads * lanes])`, a task on each thread."""
    out = tirx.decl_buffer((threads * isa.lanes,), "float32", "out")
    with IRBuilder() as builder, parallel(threads) as t:
        sums = [local(isa.lanes, "float32") for _ in range(_chains(isa))]
        for i, row in enumerate(sums):
            store(row, 0, splat(f32(float(i)), isa.lanes), isa.lanes)
        factor = I.bind(splat(out[0], isa.lanes))
        with I.serial(0, STEPS):
            for row in sums:
                store(row, 0, isa.fma(load(row, 0, isa.lanes), factor, factor), isa.lanes)
        total = load(sums[0], 0, isa.lanes)
        for row in sums[1:]:
            total = total + load(row, 0, isa.lanes)
        store(out, t * isa.lanes, total, isa.lanes)
    function = tirx.PrimFunc([out], builder.get())
    return function.with_attr({"global_symbol": "multiply_add", "tirx.noalias": True})


def multiply_add_flops(isa: ISA, threads: int) -> int:
    """Return how many multiplications and additions a call is."""
    return 2 * _chains(isa) * isa.lanes * STEPS * threads


def _chains(isa: ISA) -> int:
    """Independent sums, enough to hide how long one takes."""
    return isa.registers - 4

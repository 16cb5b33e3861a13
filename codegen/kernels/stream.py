"""Read a buffer as fast as memory gives it: the yardstick of every kernel that is bound by memory."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder

from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, i32, load, local, parallel, splat, store, tirx

__all__ = ["stream_read"]

_TASKS = 64
_VECTORS = 8


def stream_read(isa: ISA) -> Any:
    """Return the PrimFunc `stream_read(data int32[n], out int32[64 * 8 * lanes])`, n a multiple of 512 * lanes."""
    n = tirx.Var("n", "int64")
    data = tirx.decl_buffer((n,), "int32", "data")
    out = tirx.decl_buffer((_TASKS * _VECTORS * isa.lanes,), "int32", "out")
    step = _VECTORS * isa.lanes
    launch, barrier = (f"pragma_parallel_{what}" for what in ("launch_point", "barrier_when_finish"))
    with IRBuilder() as builder, I.attr(0, launch, 1), I.attr(0, barrier, 1), parallel(_TASKS) as task:
        acc = local(step, "int32")
        for v in range(_VECTORS):
            store(acc, v * isa.lanes, splat(i32(0), isa.lanes), isa.lanes)
        count = I.bind(tirx.Cast("int32", tirx.floordiv(n, _TASKS * step)))
        base = I.bind(tirx.Cast("int64", task) * tirx.Cast("int64", count))
        with I.serial(0, count) as s:
            for v in range(_VECTORS):
                at = (base + tirx.Cast("int64", s)) * step + v * isa.lanes
                mixed = tirx.bitwise_xor(load(acc, v * isa.lanes, isa.lanes), load(data, at, isa.lanes))
                store(acc, v * isa.lanes, mixed, isa.lanes)
        for v in range(_VECTORS):
            store(out, task * step + v * isa.lanes, load(acc, v * isa.lanes, isa.lanes), isa.lanes)
    func = tirx.PrimFunc([data, out], builder.get())
    return func.with_attr({"global_symbol": "stream_read", "tirx.noalias": True})

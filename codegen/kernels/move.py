"""Move what a selection keeps of a cache to the front of it."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder

from specqd.codegen.kernels.cache import Keys, Paged, Values, by_position
from specqd.codegen.tir import I, bind, i32, parallel, tirx
from specqd.manifest import BLOCK

__all__ = ["move"]


def move(name: str, planes: int, first: int, key_form: Keys, value_form: Values) -> Any:
    """Return the PrimFunc `move_<name>(keys, values, blocks, where int32[2], kept int32[planes * count])`.

    `where` holds the begin of the sequence's tables in `blocks`, and `count`. For each plane of the cache, of which
    the model's are those from `first` on, slot `kept[i]` becomes slot `i`; `kept` ascends.
    """
    shapes = (("keys", key_form.dtype), ("values", value_form.dtype), ("blocks", "int32"), ("kept", "int32"))
    buffers = {n: tirx.decl_buffer((tirx.Var(f"{n}_size", "int32"),), dtype, n) for n, dtype in shapes}
    where = tirx.decl_buffer((2,), "int32", "where")
    launch, barrier = (f"pragma_parallel_{what}" for what in ("launch_point", "barrier_when_finish"))
    with IRBuilder() as builder, I.attr(0, launch, 1), I.attr(0, barrier, 1), parallel(planes) as plane:
        keys, values = buffers["keys"], buffers["values"]
        pool = bind(keys.shape[0] // (planes * key_form.elements))
        cache = Paged(
            keys, values, key_form, value_form, pool, i32(0), buffers["blocks"], where, where, first
        )
        table, _ = cache.stand(plane, i32(0))
        count = bind(where[1])
        with I.serial(0, count) as slot:
            source = bind(buffers["kept"][plane * count + slot])
            with I.If(source != slot), I.Then():
                old, new = (bind(cache.block(plane, table, s // BLOCK)) for s in (source, slot))
                for form, buffer in ((key_form, keys), (value_form, values)):
                    for begin, apart, step, size in by_position(form).parts():
                        into = bind(new * form.elements + begin + slot % BLOCK * apart)
                        out_of = bind(old * form.elements + begin + source % BLOCK * apart)
                        with I.serial(0, size) as i:
                            I.buffer_store(buffer, buffer[out_of + i * step], [into + i * step])
    arguments = [keys, values, buffers["blocks"], where, buffers["kept"]]
    func = tirx.PrimFunc(arguments, builder.get())
    return func.with_attr({"global_symbol": f"move_{name}", "tirx.noalias": True})

"""Attention over a cache: one phase that writes queries, keys and values where they belong, one that attends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from torch import fx

from specqd.cache_formats import FORMATS, signs
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.attention import attention
from specqd.codegen.kernels.cache import BF16Keys, BF16Values, Keys, Paged, Recent, Values, by_position
from specqd.codegen.kernels.cache_int4 import INT4Keys, INT4Values
from specqd.codegen.kernels.cache_int8 import INT8Keys, INT8Values
from specqd.codegen.kernels.cache_turbo import TurboKeys, TurboValues
from specqd.codegen.kernels.move import move
from specqd.codegen.kernels.pack_blocks import pack_blocks
from specqd.codegen.kernels.queries import Attention
from specqd.codegen.kernels.received import received
from specqd.codegen.kernels.rotation import rotate
from specqd.codegen.lower.values import Value, of_buffer
from specqd.codegen.tir import I, f32, i32, local
from specqd.errors import CodegenError
from specqd.manifest import BLOCK, LONGEST_PASS, recent_blocks
from specqd.program import KVCache, Program

__all__ = ["FORMS", "cached_attention", "movers"]

FORMS: dict[str, tuple[Callable[[ISA, int], Keys], Callable[[ISA, int], Values]]] = {
    "bfloat16": (BF16Keys, BF16Values),
    "int8": (INT8Keys, INT8Values),
    "int4": (INT4Keys, INT4Values),
    **{
        f"turbo{bits}": (partial(TurboKeys, bits=bits), partial(TurboValues, bits=bits)) for bits in (3, 4, 5)
    },
}
"""How keys and values of each format of specqd.cache_formats lie in memory."""


def cached_attention(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    """Lower `specqd::cached_attention`; see specqd/ops.py for its meaning and kernels/cache.py for the layout."""
    q, k, v = (f.argument(x) for x in node.args[:3])
    name = f.env[node.args[3]].removesuffix("_k")
    cache = f.program.caches[name]
    scale, layer, window, softcap, sinks = node.args[6:11]
    names = (argument.name for argument in node.target._schema.arguments)
    observed = dict(zip(names, node.args, strict=False)).get("received") is not None
    shape = Attention(
        f.step.rows,
        q.shape[1],
        k.shape[1],
        q.shape[3],
        v.shape[3],
        scale,
        f.adjacent,
        window,
        softcap,
        cache.whole_blocks,
        signs(cache.key_dim) if FORMATS[cache.key_dtype].turned else (),
        signs(cache.value_dim) if cache.rotated or FORMATS[cache.value_dtype].turned else (),
    )
    first, stride = f.layers.get(node, (int(layer), 0))
    where = i32(first) if f.step.iteration is None else f.step.iteration * stride + first
    paged = _paged(f, cache, where)
    written = paged.recent or paged
    queries = f.step.scratch(shape.rows * shape.heads * shape.pairs * 2, "float32")
    with f.step.phase():
        _write_queries(f, shape, q, queries)
        _write(f, shape, k, written, written.keys, written.key_form, shape.key_signs)
        _write(f, shape, v, written, written.values, written.value_form, shape.value_signs)
    if paged.recent is not None:
        pack_blocks(shape, paged, paged.recent, f.step.phase)
    out = f.step.scratch(shape.rows * shape.heads * shape.value_dim, "float32")
    sink = f.argument(sinks) if sinks is not None else None
    of_head = None if sink is None else lambda head: sink.at([head])
    totals = f.step.scratch(shape.rows * shape.heads * 2, "float32") if observed else None
    attention(f.isa, shape, queries, paged, of_head, out, f.step.phase, totals)
    if observed:
        weights = f.step.parameter("received", "received", "float32", (f.program.planes * cache.capacity,))
        received(f.isa, shape, queries, paged, totals, weights, cache.capacity, f.step.phase)
    return of_buffer(f.space, out, (1, shape.rows, shape.heads, shape.value_dim), "float32")


def _paged(f: Any, cache: KVCache, layer: Any) -> Paged:
    """Declare the buffers of a cache."""
    of_keys, of_values = _forms(f.isa, cache)
    keys, values, pool = _buffers(f, cache, of_keys, of_values)
    recent = None if cache.recent is None else _recent(f, cache, layer, cache.recent)
    first = f.program.first_plane(cache.name)
    rows = f.blocks, f.tables, f.positions
    return Paged(keys, values, of_keys, of_values, pool, layer, *rows, first, recent)


def _recent(f: Any, cache: KVCache, layer: Any, positions: int) -> Recent:
    if f.step.rows > LONGEST_PASS:
        raise CodegenError(
            f"a pass of {f.step.rows} rows does not fit into the recent blocks of the cache {cache.name}: "
            f"take {LONGEST_PASS} at most"
        )
    of_keys, of_values = BF16Keys(f.isa, cache.key_dim), BF16Values(f.isa, cache.value_dim)
    turns = recent_blocks(positions)
    keys, values, pool = _buffers(f, cache, of_keys, of_values, turns)
    first, window = f.program.first_plane(cache.name), positions // BLOCK
    rows = f.blocks, f.tables, f.positions
    return Recent(keys, values, of_keys, of_values, pool, layer, *rows, first, None, window, turns)


def _buffers(
    f: Any, cache: KVCache, of_keys: Keys, of_values: Values, turns: int = 0
) -> tuple[Any, Any, Any]:
    """Return the buffers of keys and values and the blocks of a plane; with `turns`, of a sequence's recent ones."""
    name, kind = (f"{cache.name}_recent", "recent") if turns else (cache.name, "cache")
    keys, values = (
        f.step.cache(f"{name}_{part}", form.dtype, cache.planes, form.elements * max(turns, 1), kind)
        for part, form in (("k", of_keys), ("v", of_values))
    )
    return keys, values, I.bind(keys.shape[0] // (cache.planes * of_keys.elements))


def movers(program: Program, isa: ISA) -> dict[str, Any]:
    """Return the functions that move what is kept of each cache of a program, by symbol."""
    return {
        f"move_{name}": move(name, cache.planes, program.first_plane(name), *_forms(isa, cache))
        for name, cache in program.caches.items()
    }


def _forms(isa: ISA, cache: KVCache) -> tuple[Keys, Values]:
    unknown = {cache.key_dtype, cache.value_dtype} - FORMS.keys()
    if unknown:
        raise CodegenError(
            f"cache {cache.name} is {unknown.pop()}; compiled code keeps its cache in {', '.join(FORMS)}"
        )
    of_keys, of_values = FORMS[cache.key_dtype][0], FORMS[cache.value_dtype][1]
    return of_keys(isa, cache.key_dim), of_values(isa, cache.value_dim)


def _fill(f: Any, value: Value, head: Any, row: Any, size: int, store: Any) -> None:
    """Compute the channels of one head of one row, form by form; `store(channel, expression)` keeps them."""
    marks = sorted({0, size, *(b for b in value.breaks if 0 < b < size)})
    for low, high in pairwise(marks):
        f.step.over(
            i32(low), high - low, value.vectorises, lambda d: store(d, value.at([i32(0), head, row, d]))
        )


def _write_queries(f: Any, a: Attention, q: Value, out: Any) -> None:
    with f.step.parallel(a.rows * a.heads) as u:
        row, head = f.space.simplify(u // a.heads), f.space.simplify(u % a.heads)
        first = I.bind(u * (2 * a.pairs))
        if a.key_signs:
            line = local(a.key_dim, "float32")
            _fill(f, q, head, row, a.key_dim, lambda d, x: I.buffer_store(line, x, [d]))
            rotate(line, a.key_dim, a.key_signs)
            with I.serial(0, a.key_dim) as d:
                I.buffer_store(out, line[d], [first + d])
        else:
            _fill(f, q, head, row, a.key_dim, lambda d, x: I.buffer_store(out, x, [first + d]))
        if a.key_dim % 2:
            I.buffer_store(out, f32(0.0), [first + a.key_dim])


def _write(
    f: Any,
    a: Attention,
    x: Value,
    cache: Paged,
    buffer: Any,
    form: Keys | Values,
    signs: tuple[int, ...] = (),
) -> None:
    """Write the keys or values of all rows to their places in the cache, rotated if there are signs."""
    size, lanes = form.channels, f.isa.lanes
    padded = -(-size // lanes) * lanes
    with f.step.parallel(a.rows * a.kv_heads) as u:
        row, head = f.space.simplify(u // a.kv_heads), f.space.simplify(u % a.kv_heads)
        line = local(padded, "float32")
        for d in range(size, padded):
            I.buffer_store(line, f32(0.0), [d])
        _fill(f, x, head, row, size, lambda d, value: I.buffer_store(line, value, [d]))
        if signs:
            rotate(line, size, signs)
        plane = I.bind(cache.layer * a.kv_heads + head)
        table, slot = cache.stand(plane, row)
        block = I.bind(cache.block(plane, table, slot // BLOCK) * form.elements)
        by_position(form).write(buffer, block, I.bind(slot % BLOCK), line)

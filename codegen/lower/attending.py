"""Attention over a cache: one phase that writes queries, keys and values where they belong, one that attends."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import fx

from specqd.codegen.kernels.activations import bf16_bits
from specqd.codegen.kernels.attention import Attention, Paged, attention
from specqd.codegen.kernels.received import received
from specqd.codegen.lower.values import Value, of_buffer
from specqd.codegen.tir import I, f32, i32, local, tirx
from specqd.errors import CodegenError
from specqd.manifest import BLOCK
from specqd.program import KVCache

__all__ = ["block_sizes", "cached_attention"]


def block_sizes(cache: KVCache) -> tuple[int, int]:
    """Elements of one block of positions in all planes: int32 pairs of keys, int16 values (both BF16 bits)."""
    slots = cache.layers * cache.kv_heads * BLOCK
    return slots * -(-cache.key_dim // 2), slots * cache.value_dim


def cached_attention(f: Any, node: fx.Node, _: list[fx.Node]) -> Value:
    """Lower `specqd::cached_attention`, observed or not.

    See specqd/ops.py for its meaning and kernels/attention.py for the layout.
    """
    q, k, v = (f.argument(x) for x in node.args[:3])
    name = f.env[node.args[3]].removesuffix("_k")
    cache = f.program.caches[name]
    if cache.dtype != "bfloat16":
        raise CodegenError(f"cache {name} is {cache.dtype}; compiled code keeps its cache in bfloat16")
    scale, layer, window, softcap, sinks, *observed = node.args[6:]
    shape = Attention(
        f.step.rows, q.shape[1], k.shape[1], q.shape[3], v.shape[3], scale, f.adjacent, window, softcap
    )
    first, stride = f.layers.get(node, (int(layer), 0))
    where = i32(first) if f.step.iteration is None else f.step.iteration * stride + first
    of_keys, of_values = block_sizes(cache)
    keys = f.step.cache(f"{name}_k", "int32", of_keys)
    values = f.step.cache(f"{name}_v", "int16", of_values)
    pool, first = I.bind(keys.shape[0] // of_keys), f.program.first_plane(name)
    paged = Paged(keys, values, pool, where, f.blocks, f.tables, f.positions, first)
    queries = f.step.scratch(shape.rows * shape.heads * shape.pairs * 2, "float32")
    with f.step.phase():
        _write_queries(f, shape, q, queries)
        _write_keys(f, shape, k, paged)
        _write_values(f, shape, v, paged)
    out = f.step.scratch(shape.rows * shape.heads * shape.value_dim, "float32")
    sink = f.argument(sinks) if sinks is not None else None
    of_head = None if sink is None else lambda head: sink.at([head])
    totals = f.step.scratch(shape.rows * shape.heads * 2, "float32") if observed else None
    attention(f.isa, shape, queries, paged, of_head, out, f.step.phase, totals)
    if observed:
        emphasis = f.step.parameter("emphasis", "emphasis", "float32", (shape.rows,))
        planes = f.program.first_plane(None)
        weights = f.step.parameter("received", "received", "float32", (planes * cache.capacity,))
        received(f.isa, shape, queries, paged, totals, emphasis, weights, cache.capacity, f.step.phase)
    return of_buffer(f.space, out, (1, shape.rows, shape.heads, shape.value_dim), "float32")


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
        _fill(f, q, head, row, a.key_dim, lambda d, x: I.buffer_store(out, x, [u * (2 * a.pairs) + d]))
        if a.key_dim % 2:
            I.buffer_store(out, f32(0.0), [u * (2 * a.pairs) + a.key_dim])


def _slot(a: Attention, cache: Paged, row: Any, head: Any) -> tuple[Any, Any]:
    """Return the block of a row's slot in its plane, and the slot's place in the block."""
    plane = I.bind(cache.layer * a.kv_heads + head)
    table, slot = cache.stand(plane, row)
    return I.bind(cache.block(plane, table, slot // BLOCK)), slot % BLOCK


def _write_keys(f: Any, a: Attention, k: Value, cache: Paged) -> None:
    with f.step.parallel(a.rows * a.kv_heads) as u:
        row, head = f.space.simplify(u // a.kv_heads), f.space.simplify(u % a.kv_heads)
        line = local(2 * a.pairs, "float32")
        if a.key_dim % 2:
            I.buffer_store(line, f32(0.0), [a.key_dim])
        _fill(f, k, head, row, a.key_dim, lambda d, x: I.buffer_store(line, x, [d]))
        block, slot = _slot(a, cache, row, head)
        with I.serial(0, a.pairs) as d:
            high = tirx.shift_left(bf16_bits(line[d * 2 + 1]), i32(16))
            word = tirx.bitwise_or(bf16_bits(line[d * 2]), high)
            I.buffer_store(cache.keys, word, [(block * a.pairs + d) * BLOCK + slot])


def _write_values(f: Any, a: Attention, v: Value, cache: Paged) -> None:
    with f.step.parallel(a.rows * a.kv_heads) as u:
        row, head = f.space.simplify(u // a.kv_heads), f.space.simplify(u % a.kv_heads)
        block, slot = _slot(a, cache, row, head)
        base = I.bind((block * BLOCK + slot) * a.value_dim)
        _fill(
            f,
            v,
            head,
            row,
            a.value_dim,
            lambda d, x: I.buffer_store(cache.values, tirx.Cast("int16", bf16_bits(x)), [base + d]),
        )

"""Matrix times rows with MXFP4 or INT8 weights and activations rounded to INT8 in blocks of 32.

Blocks of 16 output channels, as in `dense`. MXFP4: `[n/16, k/8, 16 rows, 4 bytes]`, byte `j` of a row holding the
codes of inputs `j` (low nibble) and `j + 4` (high nibble) of a group of eight, and scales `[n/16, k/32, 16]` E8M0
bytes. INT8: `[n/16, k/4, 16 rows, 4]`, one float32 scale an output channel. Integer sums are exact; the float32
chain over blocks of 32 has a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.dense import BLOCK, Finish
from specqd.codegen.kernels.tiling import row_tiles, tasks
from specqd.codegen.sparse_kernels.reading import Reader, Sparse
from specqd.codegen.tir import I, f32, i32, load, local, parallel, prefetch, splat, store, tirx

__all__ = ["GROUP", "integer"]

#: inputs that share one activation scale (and, in MXFP4, one weight scale)
GROUP = 32
#: bytes that the weights are asked for ahead: a page, where the CPU's own prefetch stops
AHEAD = 4096


def integer(
    isa: ISA,
    rows: int,
    n: int,
    k: int,
    x: tuple[Any, Any, Any],
    weight: tuple[Any, Any],
    offset: tuple[Any, Any],
    kind: str,
    finish: Finish,
    phase: Any,
    space: Any,
) -> None:
    """Emit one phase for `kind` "mxfp4" or "int8"; `k` is a multiple of 32.

    `x` is (values int8 `[rows, k]`, scales float32 `[rows, k/32]`, sums int32 `[rows, k/32]`), `weight` the packed
    values and their scales, `offset` their first elements; values with zeros may be a `Sparse` matrix instead.
    """
    blocks = -(-n // BLOCK)
    limit = max(1, isa.accumulators * isa.lanes // BLOCK // 2)
    with phase():
        for start, count, width in tasks(blocks, max(rows, limit), limit):
            with parallel(count) as b:
                for tile, repeat in row_tiles(rows, limit):
                    with I.serial(0, repeat) as t:
                        space.bound(t, repeat)
                        base = space.simplify(tile[0] + t * tile[1])
                        _tile(isa, k, start + b * width, base, tile[1], x, weight, offset, kind, finish)


def _tile(
    isa: ISA,
    k: int,
    block: Any,
    base: Any,
    rows: int,
    x: Any,
    weight: Any,
    offset: Any,
    kind: str,
    finish: Finish,
) -> None:
    lanes, vectors, groups = isa.lanes, BLOCK // isa.lanes, k // GROUP
    acc = [local(BLOCK, "float32") for _ in range(rows)]
    for row in acc:
        for v in range(vectors):
            store(row, v * lanes, splat(f32(0.0), lanes), lanes)
    table = isa.e2m1_table() if kind == "mxfp4" else None
    reader = weight[0].reader(block) if isinstance(weight[0], Sparse) else None
    lines = 0 if reader else 4 if kind == "mxfp4" else 8
    with I.serial(0, groups) as g:
        for line in range(lines):
            prefetch(weight[0], offset[0] + ((block * groups + g) * lines + line) * 64 + AHEAD)
        for v in range(vectors):
            columns, scale = _columns(isa, kind, weight, offset, block * groups + g, v * lanes, table, reader)
            for m in range(rows):
                _accumulate(isa, columns, scale, x, (base + m) * groups + g, acc[m], v * lanes, kind)
    if kind == "int8":
        for v in range(vectors):
            scale = I.bind(load(weight[1], offset[1] + block * BLOCK + v * lanes, lanes))
            for m in range(rows):
                # Plus zero, or LLVM would fuse the product into a bias or residual wherever it sees both.
                product = isa.fma(load(acc[m], v * lanes, lanes), scale, splat(f32(0.0), lanes))
                store(acc[m], v * lanes, product, lanes)
    for m in range(rows):
        finish(base + m, block * BLOCK, acc[m], 0)


def _columns(
    isa: ISA, kind: str, weight: Any, offset: Any, group: Any, lane: int, table: Any, reader: Reader | None
) -> tuple[list[Any], Any]:
    """Load one group of 32 inputs for `isa.lanes` channels: 8 columns of 4 inputs each, and their scale, if any."""
    lanes = isa.lanes
    if kind == "mxfp4":
        scale = I.bind(_e8m0(load(weight[1], offset[1] + group * BLOCK + lane, lanes), lanes))
        at = offset[0] + group * 256 + lane * 4
        codes = reader.pairs(group * 8, 4) if reader else _mxfp4_codes(isa, weight[0], at)
        return [I.bind(isa.e2m1(code, table)) for code in codes], scale
    if reader:
        return reader.vectors(group * 8, 8), None
    return [
        I.bind(load(weight[0], offset[0] + (group * 8 + c) * 64 + lane * 4, lanes * 4)) for c in range(8)
    ], None


def _mxfp4_codes(isa: ISA, codes: Any, at: Any) -> Iterator[Any]:
    """Unpack 8 columns of 4 inputs each: int8 lanes that hold a code."""
    n, lanes = isa.lanes * 4, isa.lanes
    low_mask = splat(tirx.const(0x0F0F0F0F, "int32"), lanes)
    for c in range(4):
        packed = I.bind(tirx.reinterpret(f"int32x{lanes}", load(codes, at + c * 64, n)))
        for shifted in (packed, tirx.shift_right(packed, splat(i32(4), lanes))):
            yield tirx.reinterpret(f"int8x{n}", tirx.bitwise_and(shifted, low_mask))


def _e8m0(scales: Any, lanes: int) -> Any:
    """`2^(byte - 127)`; byte 0 was settled when packing."""
    return tirx.reinterpret(
        f"float32x{lanes}", tirx.shift_left(tirx.Cast(f"int32x{lanes}", scales), splat(i32(23), lanes))
    )


def _accumulate(
    isa: ISA, columns: list[Any], scale: Any, x: Any, block: Any, acc: Any, i: int, kind: str
) -> None:
    values, scales, sums = x
    lanes = isa.lanes
    words = [tirx.BufferLoad(values, [block * 8 + c]) for c in range(8)]
    pairs = [
        (w, tirx.reinterpret(f"int8x{lanes * 4}", splat(q, lanes)))
        for w, q in zip(columns, words, strict=True)
    ]
    if kind == "mxfp4":
        total = isa.dot_unsigned(splat(sums[block] * i32(-12), lanes), pairs)
        factor = splat(scales[block] * f32(0.5), lanes) * scale
    else:
        start = (
            splat(sums[block] * i32(isa.signed_correction), lanes)
            if isa.signed_correction
            else splat(i32(0), lanes)
        )
        total = isa.dot_signed(start, pairs)
        factor = splat(scales[block], lanes)
    store(acc, i, isa.fma(tirx.Cast(f"float32x{lanes}", total), factor, load(acc, i, lanes)), lanes)

"""Converts activations between NCHW and blocks of channels, at the ends of a chain of convolutions."""

from __future__ import annotations

from typing import Any

from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT, block, blocked_shape
from specqd.codegen.dense_kernels.packing import transposed
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, load, store, tirx

__all__ = ["from_blocks", "to_blocks"]

Shape = tuple[int, int, int, int]


def to_blocks(shape: Shape, dtype: str, isa: ISA, symbol: str = "to_blocks") -> Any:
    """Return the PrimFunc `(planes, blocks)` for an NCHW `shape`; lanes that are no channels become zero."""
    return _conversion(shape, dtype, isa, symbol, into=True)


def from_blocks(shape: Shape, dtype: str, isa: ISA, symbol: str = "from_blocks") -> Any:
    """Return the PrimFunc `(blocks, planes)` for an NCHW `shape`."""
    return _conversion(shape, dtype, isa, symbol, into=False)


def _conversion(shape: Shape, dtype: str, isa: ISA, symbol: str, into: bool) -> Any:
    kernel = Kernel(isa)
    batch, channels, height, width = shape
    size, area = block(channels, dtype), height * width
    view = "uint16" if dtype == "bfloat16" else dtype
    order = [("planes", shape), ("blocks", blocked_shape(*shape, dtype))]
    given, made = (
        kernel.argument(name, whole, dtype, view) for name, whole in (order if into else order[::-1])
    )
    planes, blocks = (given, made) if into else (made, given)
    count = -(-channels // size)
    lanes = isa.lanes
    with kernel.launch(), kernel.phase(batch * count * (size // OUT)) as task:
        group = bind(task % (size // OUT))
        whole = bind(task // (size // OUT))
        first = bind(whole % count * size + group * OUT)
        plane, pixel = (
            bind((whole // count * channels + first) * area),
            bind(whole * area * size + group * OUT),
        )
        with I.serial(0, OUT // lanes) as part:
            v = part * lanes
            present = bind(tirx.max(tirx.min(tirx.const(lanes, "int32"), channels - first - v), 0))
            with I.If(present == lanes):
                with I.Then():
                    _whole(planes, blocks, plane + v * area, pixel + v, (area, size, lanes), into)
                with I.Else():
                    _ragged(
                        planes, blocks, plane + v * area, pixel + v, (area, size, lanes), present, view, into
                    )
    return kernel.function(symbol)


def _whole(planes: Any, blocks: Any, plane: Any, pixel: Any, sizes: tuple[int, int, int], into: bool) -> None:
    """Move `lanes` channels of all pixels, as squares that are transposed in registers."""
    area, size, lanes = sizes
    squares = area // lanes
    if squares:
        with I.serial(0, squares) as s:
            at = bind(s * lanes)
            if into:
                rows = [bind(load(planes, plane + i * area + at, lanes)) for i in range(lanes)]
                for i, row in enumerate(transposed(rows)):
                    store(blocks, pixel + (at + i) * size, row, lanes)
            else:
                rows = [bind(load(blocks, pixel + (at + i) * size, lanes)) for i in range(lanes)]
                for i, row in enumerate(transposed(rows)):
                    store(planes, plane + i * area + at, row, lanes)
    if area % lanes:
        with I.serial(squares * lanes, area) as p:
            for i in range(lanes):
                _one(planes, plane + i * area + p, blocks, pixel + p * size + i, into)


def _ragged(
    planes: Any,
    blocks: Any,
    plane: Any,
    pixel: Any,
    sizes: tuple[int, int, int],
    present: Any,
    view: str,
    into: bool,
) -> None:
    area, size, lanes = sizes
    with I.serial(0, area) as p:
        if into:
            for i in range(lanes):
                store(blocks, pixel + p * size + i, tirx.const(0, view), 1)
        with I.serial(0, present) as i:
            _one(planes, plane + i * area + p, blocks, pixel + p * size + i, into)


def _one(planes: Any, plane: Any, blocks: Any, at: Any, into: bool) -> None:
    if into:
        store(blocks, at, planes[plane], 1)
    else:
        store(planes, plane, blocks[at], 1)

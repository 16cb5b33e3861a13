"""Convolutions whose lanes read inputs of their own: depthwise, and groups smaller than a block of channels.

Each lane is an output channel, so a vector of inputs is loaded as it lies (depthwise), permuted (groups as wide
as they are deep that fill a vector) or gathered. There is
no padded copy: rows of taps outside the image are not visited, and pixels that a column of taps would take
from outside are left out where code is generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from specqd.codegen.dense_kernels.epilogue import Ending
from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import OUT, block, blocked_shape
from specqd.codegen.dense_kernels.operands import sum_type
from specqd.codegen.dense_kernels.product import serial
from specqd.codegen.dense_kernels.spec import ConvSpec
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, i32, load, local, splat, store, tirx
from specqd.errors import CodegenError

__all__ = ["lane_convolution"]

#: vectors of outputs from which a task is worth its start
_TASK = 128


def lane_convolution(spec: ConvSpec, isa: ISA, symbol: str) -> Any:
    """Return the function `(x, weight, [correction, [scale, [steps]]], [bias], [residual], out)`; `x` is in blocks."""
    if spec.planes:
        raise CodegenError(
            f"a convolution of {spec.groups} groups reads channels in blocks: convert its input first"
        )
    kernel = Kernel(isa)
    view = "uint16" if spec.dtype == "bfloat16" else spec.dtype
    stored = "int8" if spec.dtype == "uint8" else spec.dtype
    shape = blocked_shape(spec.batch, spec.in_channels, spec.height, spec.width, spec.dtype)
    x = kernel.argument("x", shape, spec.dtype, view)
    blocks, each = -(-spec.out_channels // OUT), spec.in_channels // spec.groups
    taps = spec.kernel[0] * spec.kernel[1]
    weight = kernel.argument(
        "weight", (blocks, each, taps, OUT), stored, "uint16" if stored == "bfloat16" else stored
    )
    rows, columns = spec.out_height, spec.out_width
    out_shape = blocked_shape(spec.batch, spec.out_channels, rows, columns, spec.out_dtype)
    ending = Ending(kernel, isa, spec, blocks * OUT, out_shape)
    high = min(rows, -(-_TASK // columns))
    bands = -(-rows // high)
    with kernel.launch(), kernel.phase(spec.batch * blocks * bands) as task:
        band, first, batch = bind(task % bands), bind(task // bands % blocks), bind(task // (bands * blocks))
        sums = kernel.scratch(columns * OUT, sum_type(spec.dtype))
        size = block(spec.out_channels, spec.out_dtype)
        channel = bind(first * OUT)
        plane = bind(batch * out_shape[1] + channel // size)
        with I.serial(0, tirx.min(i32(high), rows - band * high)) as r:
            row = bind(band * high + r)
            _Row(spec, isa, x, weight, first, batch, row).emit(sums)
            to = bind((plane * rows + row) * columns * size + channel % size)
            with I.serial(0, columns) as c:
                ending.write(sums, c * OUT, channel, to + c * size)
    return kernel.function(symbol)


@dataclass(frozen=True)
class _Row:
    """One row of one block of output channels."""

    spec: ConvSpec
    isa: ISA
    x: Any
    weight: Any
    first: Any
    batch: Any
    row: Any

    def emit(self, sums: Any) -> None:
        spec = self.spec
        limit = min(14, (self.isa.registers - 4) * self.isa.lanes // OUT)
        # Inputs of a group are unrolled, a gathered vector is as many loads as lanes: few pixels keep the code small.
        limit = max(2, 4 * limit // max(4, spec.in_channels // spec.groups)) if self._permuted else 2
        wide = -(-spec.out_width // -(-spec.out_width // limit))
        inner = [
            c
            for c in range(0, spec.out_width - wide + 1, wide)
            if self._whole(c) and self._whole(c + wide - 1)
        ]
        if inner:
            with I.serial(0, len(inner)) as s:
                self._tile(sums, bind(inner[0] + s * wide), range(wide), None)
        for column in range(0, spec.out_width, wide):
            if column not in inner:
                self._tile(sums, i32(column), range(min(wide, spec.out_width - column)), column)

    @property
    def _permuted(self) -> bool:
        each = self.spec.in_channels // self.spec.groups
        return self.spec.in_channels == self.spec.out_channels and self.isa.lanes % each == 0

    def _inside(self, column: int, tap: int) -> bool:
        at = column * self.spec.stride[1] - self.spec.padding[1] + tap * self.spec.dilation[1]
        return 0 <= at < self.spec.width

    def _whole(self, column: int) -> bool:
        return all(self._inside(column, tap) for tap in range(self.spec.kernel[1]))

    def _tile(self, sums: Any, column: Any, pixels: range, known: int | None) -> None:
        """Compute pixels from `column` on; `known` is the column if some are at a border.

        Where none is, `zero` comes off the sums instead of each input.
        """
        spec, lanes, kind = self.spec, self.isa.lanes, sum_type(self.spec.dtype)
        early, late = (0, spec.zero) if known is None else (spec.zero, 0)
        acc, visited = [local(OUT, kind) for _ in pixels], [local(OUT, kind)] if late else []
        for row in acc + visited:
            for v in range(0, OUT, lanes):
                store(row, v, splat(tirx.const(0, kind), lanes), lanes)
        (height, width), each = spec.kernel, spec.in_channels // spec.groups
        down = spec.dilation[0]
        top = bind(self.row * spec.stride[0] - spec.padding[0])
        start = bind(tirx.max(i32(0), (down - 1 - top) // down))
        end = bind(tirx.min(i32(height), (spec.height - 1 - top) // down + 1))
        unrolled = each if self._permuted else 1
        with I.serial(start, end) as h, serial(each // unrolled) as s:
            line = bind((top + h * down) * spec.width + column * spec.stride[1] - spec.padding[1])
            for tap, i in product(range(width), range(unrolled)):
                j = i if self._permuted else s
                at = ((self.first * each + j) * height + h) * width + tap
                taken = [p for p in pixels if known is None or self._inside(known + p, tap)]
                self._tap(acc, visited, at, (j, line + tap * spec.dilation[1]), taken, early)
        for p in pixels:
            for v in range(0, OUT, lanes):
                total = load(acc[p], v, lanes)
                for of in visited:
                    total = total - load(of, v, lanes) * splat(i32(late), lanes)
                store(sums, (column + p) * OUT + v, total, lanes)

    def _tap(
        self,
        acc: list[Any],
        visited: list[Any],
        at: Any,
        source: tuple[Any, Any],
        taken: list[int],
        zero: int,
    ) -> None:
        lanes = self.isa.lanes
        for v in range(0, OUT, lanes):
            w = bind(self._wide(load(self.weight, at * OUT + v, lanes)))
            for of in visited:
                store(of, v, load(of, v, lanes) + w, lanes)
            for p in taken:
                place = source[1] + p * self.spec.stride[1]
                self._add(acc[p], v, w, self._wide(self._inputs(place, source[0], v), zero))

    def _add(self, acc: Any, v: int, w: Any, x: Any) -> None:
        old = load(acc, v, self.isa.lanes)
        integer = sum_type(self.spec.dtype) == "int32"
        new = self.isa.multiply_short(old, x, w) if integer else self.isa.fma(w, x, old)
        store(acc, v, new, self.isa.lanes)

    def _wide(self, vector: Any, zero: int = 0) -> Any:
        """Widen stored elements to the type of sums, less `zero`."""
        lanes = self.isa.lanes
        if self.spec.dtype == "float32":
            return vector
        wide = tirx.Cast(f"int32x{lanes}", vector)
        if self.spec.dtype == "bfloat16":
            return tirx.reinterpret(f"float32x{lanes}", tirx.shift_left(wide, splat(i32(16), lanes)))
        return wide - splat(i32(zero), lanes) if zero else wide

    def _inputs(self, place: Any, j: Any, v: int) -> Any:
        """Load input `j` of the groups of lanes `v` and following, at pixel `place`."""
        spec, lanes = self.spec, self.isa.lanes
        each, outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
        if self._permuted:
            vector = load(self.x, self._place(bind(self.first * OUT + v), place), lanes)
            order = [lane // each * each + j for lane in range(lanes)]
            return vector if each == 1 else bind(tirx.Shuffle([bind(vector)], order))
        channels = [
            tirx.min((self.first * OUT + v + lane) // outputs, spec.groups - 1) * each + j
            for lane in range(lanes)
        ]
        scalars = [bind(self.x[self._place(c, place)]) for c in channels]
        return bind(tirx.Shuffle(scalars, list(range(lanes))))

    def _place(self, channel: Any, pixel: Any) -> Any:
        size = block(self.spec.in_channels, self.spec.dtype)
        blocks = -(-self.spec.in_channels // size)
        area = self.spec.height * self.spec.width
        return ((self.batch * blocks + channel // size) * area + pixel) * size + channel % size

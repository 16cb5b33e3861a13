"""Image: the input of a convolution with its padding, as it is if there is none to add, else copied in a phase."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from specqd.codegen.dense_kernels.kernel import Kernel
from specqd.codegen.dense_kernels.layout import block, blocked_shape
from specqd.codegen.dense_kernels.operands import Inputs, view_type
from specqd.codegen.dense_kernels.spec import PER_WORD, ConvSpec
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, load, splat, store, tirx

__all__ = ["Image"]


class Image:
    """Declares the input as the next argument, and memory for its copy.

    Attributes:
        words: flat buffer of the padded input.
        pixel, row, block, batch: words from one to the next.
    """

    def __init__(self, kernel: Kernel, isa: ISA, spec: ConvSpec) -> None:
        """Lay the padded input out; `fill` writes it."""
        self.kernel, self.isa, self.spec = kernel, isa, spec
        per = PER_WORD[spec.dtype]
        height, width = spec.padded
        self._assembled = spec.planes and per > 1
        if spec.planes:
            shape: tuple[int, ...] = (spec.batch, spec.in_channels, spec.height, spec.width)
            size = -(-spec.in_channels // per)
        else:
            shape = blocked_shape(spec.batch, spec.in_channels, spec.height, spec.width, spec.dtype)
            size = block(spec.in_channels, spec.dtype) // per
        self.view = view_type(spec.dtype)
        self._argument = kernel.argument(
            "x", shape, spec.dtype, {2: "uint16", 4: "uint8"}[per] if self._assembled else self.view
        )
        # Planes of whole words stay planes; others are put together to words, pixel by pixel.
        self.pixel = 1 if spec.planes and not self._assembled else size
        self.row = width * self.pixel
        self.planes = shape[1] if not self._assembled else 1
        self.block = height * self.row
        self.batch = self.planes * self.block
        self.word = self.block if spec.planes and not self._assembled else 1
        self._copied = self._assembled or any(spec.padding)
        self.words = kernel.scratch(spec.batch * self.batch, self.view) if self._copied else self._argument

    @property
    def inputs(self) -> Inputs:
        """Where the product finds its inputs."""
        (down, right), (tap_down, tap_right) = self.spec.stride, self.spec.dilation
        return Inputs(
            self.words,
            block=self.block,
            word=self.word,
            row=down * self.row,
            column=right * self.pixel,
            tap_row=tap_down * self.row,
            tap_column=tap_right * self.pixel,
        )

    def fill(self) -> None:
        """Emit the phase that copies, if one is needed."""
        if not self._copied:
            return
        spec, rows = self.spec, self.spec.padded[0]
        top, left, _, right = spec.padding
        with self.kernel.phase(spec.batch * self.planes * rows) as u:
            to, y = bind(u * self.row), bind(u % rows - top)
            with I.If(tirx.all(y >= 0, y < spec.height)):
                with I.Then():
                    self._pad(to, left)
                    self._row(bind(u // rows), y, bind(to + left * self.pixel))
                    self._pad(to + (left + spec.width) * self.pixel, right)
                with I.Else():
                    self._pad(to, spec.padded[1])

    def _pad(self, to: Any, pixels: int) -> None:
        value = tirx.const(0.0, "float32")
        if self.view == "int32":
            byte = self.spec.zero % 256
            word = byte * 0x01010101
            value = tirx.const(word - (word >> 31 << 32), "int32")
        self._span(
            pixels * self.pixel, lambda i, lanes: store(self.words, to + i, splat(value, lanes), lanes)
        )

    def _row(self, plane: Any, y: Any, to: Any) -> None:
        spec = self.spec
        if self._assembled:
            with I.serial(0, spec.width) as column:
                for word in range(self.pixel):
                    value = self._assemble(plane, y * spec.width + column, word)
                    store(self.words, to + column * self.pixel + word, value, 1)
            return
        count = spec.width * self.pixel
        at = bind((plane * spec.height + y) * count)

        def copy(i: Any, lanes: int) -> None:
            store(self.words, to + i, load(self._argument, at + i, lanes), lanes)

        self._span(count, copy)

    def _assemble(self, image: Any, place: Any, word: int) -> Any:
        """Put the channels of a word together; channels that are not there are zero."""
        spec, per = self.spec, PER_WORD[self.spec.dtype]
        first = word * per
        parts = [
            tirx.shift_left(
                tirx.Cast(
                    "int32",
                    self._argument[
                        (image * spec.in_channels + first + i) * (spec.height * spec.width) + place
                    ],
                ),
                tirx.const(32 // per * i, "int32"),
            )
            for i in range(min(per, spec.in_channels - first))
        ]
        return reduce(tirx.bitwise_or, parts)

    def _span(self, count: int, body: Callable[[Any, int], None]) -> None:
        """Run `body(i, lanes)` over `count` words, in vectors as far as they go."""
        lanes = self.isa.lanes
        if count >= lanes:
            with I.serial(0, count // lanes) as s:
                body(s * lanes, lanes)
        if count % lanes:
            with I.serial(count // lanes * lanes, count) as i:
                body(i, 1)

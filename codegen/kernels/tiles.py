"""Matrix times rows in tiles of AMX: 16 channels times 16 rows times 32 inputs an instruction, weights in BF16.

A tile of weights is 16 pairs of input channels of one block of 16 output channels: 1 KiB as `kernels/dense.py` lays
blocks out, so it streams from memory in order. The CPU adds up each output pair by pair, in order, whatever the other
rows of the tile hold: bits do not depend on how many rows are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from specqd.codegen.kernels.tiling import tasks
from specqd.codegen.sparse_kernels.reading import Sparse
from specqd.codegen.tir import I, bind, i32, local, parallel, prefetch, store, tirx

__all__ = ["INPUTS", "configure", "instruction", "release", "row_pieces", "tiled"]

#: input channels of a tile
INPUTS = 32

_ROWS = _CHANNELS = 16
_WORDS = _ROWS * _CHANNELS  # 32-bit words of a full tile
_STRIDE = 64  # bytes from one row of a full tile to the next
_SUMS = 4  # tiles 0 to 3 add up, the rest hold operands
_AHEAD = (
    64  # cache lines that a stream of weights is asked for ahead: a page, where the CPU's own prefetch stops
)

Finish = Callable[[Any, Any, Any, Any], None]


def tiled(
    rows: int, n: int, k: int, x: Any, weight: Any, offset: Any, finish: Finish, phase: Any, space: Any
) -> None:
    """Emit one phase computing `x [rows, k] @ weight.T [k, n]`, arguments as `dense` takes them; k is whole tiles."""
    steps, pieces = k // INPUTS, list(row_pieces(rows))
    most = _SUMS // max(len(sizes) for _, sizes, _ in pieces)
    with phase():
        for start, count, width in tasks(-(-n // _CHANNELS), 1, most):
            with parallel(count) as task:
                first = bind(start + task * width)
                for row, sizes, repeat in pieces:
                    configure(_shapes(sizes))
                    with I.serial(0, repeat) as t:
                        base = space.simplify(row + space.bound(t, repeat) * sum(sizes))
                        _Piece(first, width, base, sizes, steps).run(x, weight, offset, finish, space)
                release()


def row_pieces(rows: int) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Cut rows into `(first row, rows of each tile, repeats)`: pairs of full tiles while there are any."""
    pair = 2 * _ROWS
    if rows >= pair:
        yield 0, (_ROWS, _ROWS), rows // pair
    rest = rows % pair
    if rest:
        yield rows - rest, (_ROWS, rest - _ROWS) if rest > _ROWS else (rest,), 1


def _shapes(sizes: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """Say which tiles a piece uses; rows of a tile of sums follow those of its operand, weights take 16."""
    each = _SUMS // len(sizes)
    shapes = dict.fromkeys(range(8), (16, _STRIDE))
    for m, size in enumerate(sizes):
        shapes.update(dict.fromkeys([*range(m * each, (m + 1) * each), _SUMS + m], (size, _STRIDE)))
    return shapes


def configure(shapes: Mapping[int, tuple[Any, int]]) -> None:
    """Say of each tile that is used how many rows it has, perhaps an expression, and of how many bytes."""
    # Palette 1 in byte 0, bytes of a row from 16 on, two a tile, rows from 48 on, one a tile: what LDTILECFG reads.
    of_tile = [shapes.get(tile, (0, 0)) for tile in range(8)]
    words: list[Any] = [1, 0, 0, 0]
    words += [of_tile[t][1] | of_tile[t + 1][1] << 16 for t in range(0, 8, 2)] + [0] * 4
    words += [sum(of_tile[t + i][0] * (1 << 8 * i) for i in range(4)) for t in (0, 4)] + [0, 0]
    config = local(16, "int32")
    for i, word in enumerate(words):
        I.buffer_store(config, i32(word) if isinstance(word, int) else word, [i])
    I.evaluate(tirx.call_llvm_intrin("void", "llvm.x86.ldtilecfg", tirx.address_of(config[0])))


def release() -> None:
    """Emit the end of a task's work in tiles: what they hold need not be saved any more."""
    instruction("tilerelease")


class _Piece:
    """`width` blocks of channels from `first`, of rows from `base`: as many as `sizes` says, a tile each."""

    def __init__(self, first: Any, width: int, base: Any, sizes: tuple[int, ...], steps: int) -> None:
        self.first, self.width, self.base, self.sizes, self.steps = first, width, base, sizes, steps
        self.each = _SUMS // len(sizes)

    def run(self, x: Any, weight: Any, offset: Any, finish: Finish, space: Any) -> None:
        sums = [[m * self.each + j for j in range(self.width)] for m in range(len(self.sizes))]
        for tiles in sums:
            for tile in tiles:
                instruction("tilezero", tile)
        words = self.steps * (INPUTS // 2)  # of a row of x
        read = self._reading(weight, offset)
        with I.serial(0, self.steps) as s:
            for m in range(len(self.sizes)):
                row = self.base + m * _ROWS
                _load(_SUMS + m, x, row * words + s * (INPUTS // 2), words * 4)
            operands = range(_SUMS + len(self.sizes), 8)
            for j in range(self.width):
                operand = operands[j % len(operands)]
                read(operand, j, s)
                for m in range(len(self.sizes)):
                    instruction("tdpbf16ps", sums[m][j], _SUMS + m, operand)
        out = local(_WORDS, "float32")
        for m, size in enumerate(self.sizes):
            for j in range(self.width):
                instruction("tilestored64", sums[m][j], pointer=(out, 0), stride=_STRIDE)
                with I.serial(0, size) as r:
                    row = space.simplify(self.base + m * _ROWS + space.bound(r, size))
                    finish(row, (self.first + j) * _CHANNELS, out, r * _CHANNELS)

    def _reading(self, weight: Any, offset: Any) -> Callable[[int, int, Any], None]:
        """Return what loads the weights of the `block`-th block at a step: `read(tile, block, step)`."""
        if isinstance(weight, Sparse):
            readers, line = [weight.reader(self.first + j) for j in range(self.width)], local(_WORDS, "int32")

            def expanded(tile: int, block: int, step: Any) -> None:
                with I.serial(0, 16) as i:
                    at = ((self.first + block) * self.steps + step) * 16 + i
                    (vector,) = readers[block].vectors(at, 1)
                    store(line, i * 16, tirx.reinterpret("int32x16", vector), 16)
                _load(tile, line, 0, _STRIDE)

            return expanded

        def loaded(tile: int, block: int, step: Any) -> None:
            at = bind(offset + ((self.first + block) * self.steps + step) * _WORDS)
            _load(tile, weight, at, _STRIDE)
            for i in range(16):
                prefetch(weight, at + (_AHEAD + i) * 16)

        return loaded


def _load(tile: int, buffer: Any, at: Any, stride: int) -> None:
    instruction("tileloadd64", tile, pointer=(buffer, at), stride=stride)


def instruction(name: str, *tiles: int, pointer: tuple[Any, Any] | None = None, stride: int = 0) -> None:
    """Emit one instruction on tiles, which are named by number."""
    args = [tirx.const(tile, "int8") for tile in tiles]
    if pointer is not None:
        buffer, at = pointer
        args += [tirx.address_of(buffer[at]), tirx.const(stride, "int64")]
    I.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *args))

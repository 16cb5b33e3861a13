"""How Winograd's convolution is cut into tasks, and these into tiles of registers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specqd.codegen.dense_kernels.layout import OUT, POSITIONS
from specqd.codegen.dense_kernels.spec import ConvSpec
from specqd.codegen.dense_kernels.tiling import Tiling, tiling
from specqd.codegen.isa.base import ISA
from specqd.codegen.kernels.tiling import THREADS

__all__ = ["Cut", "cuts", "sizes", "tile"]

#: bytes of transformed inputs and outputs that stay in a core's second cache
_CACHE = 1 << 20
#: vector operations that transforming a tile's inputs or its outputs takes, for 16 channels
_TRANSFORM = 48


@dataclass(frozen=True)
class Cut:
    """Of a task: how many rows of tiles, and one of so many `parts` of the output channels."""

    rows: int
    parts: int


def sizes(spec: ConvSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return rows and columns of tiles, and blocks of input and of output channels."""
    return (
        (-(-spec.out_height // 2), -(-spec.out_width // 2)),
        (-(-spec.in_channels // OUT), -(-spec.out_channels // OUT)),
    )


def tile(spec: ConvSpec, isa: ISA) -> Tiling:
    """Choose what is computed together, rows evenly."""
    grid, blocks = sizes(spec)
    found = tiling(isa, *grid, blocks[1])
    return replace(found, rows=-(-grid[0] // -(-grid[0] // found.rows)))


def cuts(spec: ConvSpec, isa: ISA) -> list[Cut]:
    """Return the ways to cut tasks, by the vector operations of the busiest thread."""
    (down, across), (inputs, outputs) = sizes(spec)
    together = tile(spec, isa)

    def cost(cut: Cut) -> float:
        tiles, each = cut.rows * across, outputs // cut.parts
        # Weights are asked for before they are used; what is left of reading them is as a tile more.
        operations = POSITIONS * spec.in_channels * each * (tiles + 1)
        operations += tiles * (inputs + each) * _TRANSFORM
        kept = POSITIONS * OUT * 4 * tiles * (inputs + each)
        tasks = spec.batch * -(-down // cut.rows) * cut.parts
        # Few tasks are shared less evenly than they are cut.
        return -(-tasks // THREADS) * operations * (1 + 0.1 / tasks) * max(1.0, kept / _CACHE)

    parts = [p for p in range(1, outputs + 1) if outputs // together.blocks % p == 0]
    rows = [min(r, down) for r in range(together.rows, down + together.rows, together.rows)]
    return sorted((Cut(r, p) for r in rows for p in parts), key=cost)

"""Kernels of convolutions and matrix products, by what they compute; they know nothing of graphs."""

from typing import Any

from specqd.codegen.dense_kernels.by_lane import lane_convolution
from specqd.codegen.dense_kernels.conversion import from_blocks, to_blocks
from specqd.codegen.dense_kernels.convolution import blocked_convolution
from specqd.codegen.dense_kernels.layout import (
    block,
    blocked_shape,
    by_lane,
    by_winograd,
    corrections,
    fits_tiles,
    pack_channels,
    pack_conv,
    pack_gemm,
)
from specqd.codegen.dense_kernels.matrix import matrix_product
from specqd.codegen.dense_kernels.schedules import Schedule, schedule_of, schedules
from specqd.codegen.dense_kernels.spec import ConvSpec, Epilogue, GemmSpec, Requantise
from specqd.codegen.dense_kernels.tiled import tiled_convolution, tiled_matrix_product
from specqd.codegen.dense_kernels.winograd import winograd_convolution
from specqd.codegen.isa.base import ISA

__all__ = [
    "ConvSpec", "Epilogue", "GemmSpec", "Requantise", "Schedule", "block", "blocked_shape", "by_winograd", "conv2d",
    "corrections", "fits_tiles", "from_blocks", "gemm", "pack_channels", "pack_conv", "pack_gemm", "schedule_of",
    "schedules", "to_blocks",
]  # fmt: skip


def conv2d(spec: ConvSpec, isa: ISA, symbol: str = "conv2d", schedule: Schedule | None = None) -> Any:
    """Return the PrimFunc `(x, weight, [correction, [scale, [steps]]], [bias], [residual], out)` of a convolution.

    `x` is as `spec.planes` says, `weight` from `pack_conv`, `correction` int32 (of integers) from
    `corrections`, `scale` and `bias` float32 from `pack_channels`; `steps` float32 `[3]` (of integer outputs with
    `spec.open_steps`) are one by the scale of the output, then scale and zero of the residual. `residual` and `out` are
    in blocks (`blocked_shape`). Lanes of a last block that are no channels hold anything finite. `symbol` has to be the
    only one of its module. `schedule`: one of `schedules`, None for the first; it changes no bit of FP32 and integers.

    Raises:
        CodegenError: an argument is too large to be indexed, or in a layout that the kernel does not read.
    """
    if by_lane(spec):
        return lane_convolution(spec, isa, symbol)
    write: Any = blocked_convolution
    if by_winograd(spec):
        write = winograd_convolution
    elif fits_tiles(spec, isa):
        write = tiled_convolution
    return write(spec, isa, symbol, schedule)


def gemm(spec: GemmSpec, isa: ISA, symbol: str = "gemm", schedule: Schedule | None = None) -> Any:
    """Return the PrimFunc `(x, second, [correction, [scale, [steps]]], [bias], [residual], out)` of a matrix product.

    `x` is `[m, k]`, `second` from `pack_gemm`, `residual` and `out` `[m, n]`; with `spec.dynamic`, all have a
    batch in front and `second` is an activation. An open `m` is an int64 variable of the shapes. `schedule` as above.

    Raises:
        CodegenError: an argument is too large to be indexed.
    """
    write: Any = tiled_matrix_product if fits_tiles(spec, isa) else matrix_product
    return write(spec, isa, symbol, schedule)

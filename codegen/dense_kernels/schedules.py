"""The schedules that a kernel can have: what a search goes through, and what codegen takes without one."""

from __future__ import annotations

from collections.abc import Mapping

from specqd.codegen.dense_kernels.layout import OUT, by_lane, by_winograd, fits_tiles
from specqd.codegen.dense_kernels.spec import ConvSpec, GemmSpec
from specqd.codegen.dense_kernels.tiled import Tasks, tasks
from specqd.codegen.dense_kernels.tiling import Tiling, tilings
from specqd.codegen.dense_kernels.winograd_tasks import Cut, cuts
from specqd.codegen.isa.base import ISA

__all__ = ["Schedule", "schedule_of", "schedules"]

Schedule = Tiling | Tasks | Cut


def schedules(spec: ConvSpec | GemmSpec, isa: ISA) -> list[Schedule]:
    """Return the ways to cut a kernel: first the one it gets by itself, then what should do well.

    There is no choice, and so none, for kernels that work by lane, and for an open number of rows.
    """
    if isinstance(spec, ConvSpec):
        if by_lane(spec):
            return []
        if by_winograd(spec):
            return [*cuts(spec, isa)]
        rows, columns = spec.out_height, spec.out_width
        blocks, products = -(-spec.out_channels // OUT) // spec.groups, spec.groups * spec.batch
    else:
        if spec.m is None:
            return []
        rows, columns, blocks, products = spec.m, 1, -(-spec.n // OUT), spec.batch
    if fits_tiles(spec, isa):
        return [*tasks(blocks)]
    return [*tilings(isa, rows, columns, blocks, products)]


def schedule_of(spec: ConvSpec | GemmSpec, isa: ISA, fields: Mapping[str, int]) -> Schedule | None:
    """Return the schedule with these fields, as `dataclasses.asdict` gives them; None if the kernel has no such one."""
    return next((found for found in schedules(spec, isa) if vars(found) == dict(fields)), None)

"""Row statistics of norms: small sums in a fixed order of lanes, then of vectors."""

from __future__ import annotations

from typing import Any

from specqd.codegen import maths
from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, f32, intrinsic, load, local, splat, store, tirx

__all__ = ["mean_and_rstd", "rstd"]


def _sum(isa: ISA, size: int, term: Any, squared: bool) -> Any:
    """Sum `term(i, lanes)` (or its square) over `size` elements: four vector chains, their lanes, then the tail."""
    lanes = isa.lanes
    chains = 4 if size % (4 * lanes) == 0 else 1
    full = size // (chains * lanes)

    def plus(acc: Any, i: Any, width: int) -> Any:
        v = bind(term(i, width))
        dtype = f"float32x{width}" if width > 1 else "float32"
        return intrinsic(dtype, "llvm.fmuladd", v, v, acc) if squared else acc + v

    total = bind(f32(0.0))
    if full:
        acc = local(chains * lanes, "float32")
        for c in range(chains):
            store(acc, c * lanes, splat(f32(0.0), lanes), lanes)
        with I.serial(0, full) as s:
            for c in range(chains):
                store(
                    acc, c * lanes, plus(load(acc, c * lanes, lanes), (s * chains + c) * lanes, lanes), lanes
                )
        vector = load(acc, 0, lanes)
        for c in range(1, chains):
            vector = vector + load(acc, c * lanes, lanes)
        total = bind(isa.reduce("fadd", bind(vector)))
    for i in range(full * chains * lanes, size):
        total = bind(plus(total, i, 1))
    return total


def rstd(isa: ISA, size: int, x: Any, base: Any, eps: float) -> Any:
    """`1 / sqrt(mean(x^2) + eps)` of `size` elements of flat float32 `x` from `base`."""
    total = _sum(isa, size, lambda i, lanes: load(x, base + i, lanes), squared=True)
    return bind(f32(1.0) / tirx.sqrt(maths.fma(total, f32(1.0 / size), f32(eps))))


def mean_and_rstd(isa: ISA, size: int, x: Any, base: Any, eps: float) -> tuple[Any, Any]:
    """Mean, and `1 / sqrt(var + eps)` with the biased variance about it, as LayerNorm wants."""
    mean = bind(_sum(isa, size, lambda i, lanes: load(x, base + i, lanes), squared=False) * f32(1.0 / size))
    total = _sum(isa, size, lambda i, lanes: load(x, base + i, lanes) - splat(mean, lanes), squared=True)
    return mean, bind(f32(1.0) / tirx.sqrt(maths.fma(total, f32(1.0 / size), f32(eps))))

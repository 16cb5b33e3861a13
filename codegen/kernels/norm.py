"""Row statistics of norms: small sums in a fixed order of lanes, then of vectors."""

from __future__ import annotations

from typing import Any

from specqd.codegen.isa.base import ISA
from specqd.codegen.tir import I, bind, f32, load, local, splat, store, tirx

__all__ = ["mean_and_rstd", "rstd"]


def _sum(isa: ISA, size: int, term: Any) -> Any:
    """Sum `term(i, lanes)` over `size` elements: four vector chains, then their lanes, then the tail."""
    lanes = isa.lanes
    chains = 4 if size % (4 * lanes) == 0 else 1
    full = size // (chains * lanes)
    total = bind(f32(0.0))
    if full:
        acc = local(chains * lanes, "float32")
        for c in range(chains):
            store(acc, c * lanes, splat(f32(0.0), lanes), lanes)
        with I.serial(0, full) as s:
            for c in range(chains):
                value = load(acc, c * lanes, lanes) + term((s * chains + c) * lanes, lanes)
                store(acc, c * lanes, value, lanes)
        vector = load(acc, 0, lanes)
        for c in range(1, chains):
            vector = vector + load(acc, c * lanes, lanes)
        total = bind(isa.reduce("fadd", bind(vector)))
    for i in range(full * chains * lanes, size):
        total = total + term(i, 1)
    return bind(total)


def rstd(isa: ISA, size: int, x: Any, base: Any, eps: float) -> Any:
    """`1 / sqrt(mean(x^2) + eps)` of `size` elements of flat float32 `x` from `base`."""

    def square(i: Any, lanes: int) -> Any:
        v = bind(load(x, base + i, lanes))
        return v * v

    total = _sum(isa, size, square)
    return bind(f32(1.0) / tirx.sqrt(total * f32(1.0 / size) + f32(eps)))


def mean_and_rstd(isa: ISA, size: int, x: Any, base: Any, eps: float) -> tuple[Any, Any]:
    """Mean, and `1 / sqrt(var + eps)` with the biased variance about it, as LayerNorm wants."""
    mean = bind(_sum(isa, size, lambda i, lanes: load(x, base + i, lanes)) * f32(1.0 / size))

    def square(i: Any, lanes: int) -> Any:
        v = bind(load(x, base + i, lanes) - splat(mean, lanes))
        return v * v

    return mean, bind(f32(1.0) / tirx.sqrt(_sum(isa, size, square) * f32(1.0 / size) + f32(eps)))

"""The pipelines that `prune_quality.py` measures: masks, sparsities, calibrations and precisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

__all__ = ["Case", "of_images", "of_language"]


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        method: which weights go, as `sparsify` has it; `dense` is for none.
        sparsity: the share of zeros.
        data: what calibrates, and what Wanda and SparseGPT see: a name that the subject knows, or none.
        calibration: a method of `calibrate`, or none; `steps` calibrates twice, first with a tenth fewer zeros, as
            Lazarevich et al. do; `distil` calibrates in closed form, then distils.
        precision: float, or that of a pass which rounds the weights afterwards: int8 or mxfp4.
        allocation: of `sparsify`.
        pattern: of `sparsify`.
        seed: chooses the data.
    """

    method: str
    sparsity: float
    data: str = "none"
    calibration: str = "none"
    precision: str = "float"
    allocation: str = "uniform"
    pattern: str = "any"
    seed: int = 0

    def pruning(self, source: str) -> str:
        """Say how to prune and calibrate; `source` are options of what reads data."""
        if self.method == "dense":
            return ""
        if self.calibration == "steps":
            steps = (self._pruning(share, source) for share in (round(self.sparsity - 0.1, 4), self.sparsity))
            return ", ".join(f"{pruning}, calibrate{{{source}}}" for pruning in steps)
        pruning = self._pruning(self.sparsity, source)
        if self.calibration == "distil":
            return f"{pruning}, calibrate{{{source}}}, distil{{{source}}}"
        return (
            pruning
            if self.calibration == "none"
            else f"{pruning}, calibrate{{method={self.calibration},{source}}}"
        )

    def _pruning(self, share: float, source: str) -> str:
        zeros = (
            f"sparsity={share},allocation={self.allocation}"
            if self.pattern == "any"
            else f"pattern={self.pattern}"
        )
        needs_data = self.method != "magnitude" or self.allocation == "sensitivity"
        return f"sparsify{{{zeros},method={self.method}{f',{source}' if needs_data else ''}}}"


def of_language(sparsities: Sequence[float], seeds: Sequence[int]) -> Iterator[Case]:
    """Give the cases of a language model, all layers as sparse as each other."""
    for seed, share in product(seeds, sparsities):
        if seed == 0:
            yield Case("magnitude", share)
        yield Case("wanda", share, "text", seed=seed)
        yield Case("sparsegpt", share, "text", seed=seed)
        yield Case("magnitude", share, "text", "closed", seed=seed)
        yield Case("wanda", share, "text", "closed", seed=seed)
    for precision in ("int8", "mxfp4"):
        yield Case("dense", 0.0, precision=precision)
        yield Case("sparsegpt", 0.5, "text", precision=precision)
    for pattern in ("4:8", "2:4"):
        yield Case("magnitude", 0.5, pattern=pattern)
        for method in ("wanda", "sparsegpt"):
            yield Case(method, 0.5, "text", pattern=pattern)


def of_images(sparsities: Sequence[float], seeds: Sequence[int]) -> Iterator[Case]:
    """Give the cases of an image classifier, first those with the allocation of Lazarevich et al."""
    for seed in seeds:
        for share in sparsities:
            yield from _usual(share, seed)
        yield Case("dense", 0.0, "photos", precision="int8", seed=seed)
    for seed, share in product(seeds, sparsities):
        yield from _unusual(share, seed)
    # No way to calibrate, but what the weights that are left could do if the data were no bound.
    for share in sparsities:
        yield Case("magnitude", share, "scored", "distil", allocation="normalised")


def _usual(share: float, seed: int) -> Iterator[Case]:
    def case(data: str, calibration: str, precision: str = "float") -> Case:
        return Case("magnitude", share, data, calibration, precision, "normalised", seed=seed)

    if seed == 0:
        yield case("none", "none")
    for data in ("photos", "fractals"):
        yield case(data, "closed")
        yield case(data, "closed", "int8")
        yield case(data, "correct")
        yield case(data, "steps")
        yield case(data, "distil")
        yield case(data, "distil", "int8")
    yield case("random", "closed")


def _unusual(share: float, seed: int) -> Iterator[Case]:
    yield Case("magnitude", share, "fractals", "distil", allocation="sensitivity", seed=seed)
    for allocation in ("global", "uniform", "erk"):
        if seed == 0:
            yield Case("magnitude", share, allocation=allocation)
        yield Case("magnitude", share, "photos", "closed", allocation=allocation, seed=seed)
    for method in ("wanda", "sparsegpt"):
        yield Case(method, share, "photos", "closed", allocation="normalised", seed=seed)
    for data in ("photos", "fractals"):
        yield Case("magnitude", share, data, "adam", allocation="normalised", seed=seed)

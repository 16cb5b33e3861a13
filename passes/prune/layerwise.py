"""Solves a problem of each layer from its Gram matrix; what is solved is kept, so a run that was broken off goes on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from torch import Tensor

from specqd.passes.contract import Progress
from specqd.passes.quantize.calibration_store import Store, fingerprint
from specqd.program import Entry, Program

from .calibration_data import Data, Samples
from .gram import grams
from .layers import Layer

__all__ = ["Solutions", "layerwise"]

Solutions = dict[Layer, dict[str, Tensor]]


def layerwise(
    program: Program,
    entry: Entry,
    layers: Sequence[Layer],
    data: Data,
    samples: Samples,
    solve: Callable[..., dict[str, Tensor]],
    *options: object,
    apart: int = 0,
) -> Generator[Progress, None, Solutions]:
    """Return what `solve` makes of each layer and its Gram matrices, without layers whose inputs are not finite.

    1. Inputs are those of the dense model: pruned weights are replaced by what they were.
    2. Solutions are kept in the cache folder for a month, under all that they depend on: the entry, the dense
       weights, the data, and `options`.
    3. With `apart`, `solve` gets a second matrix, of each `apart`-th batch alone, if there are so many.

    Raises:
        InputError: the data do not suit the entry.
    """
    dense = program.copy()
    dense.weights |= program.dense
    store = Store.of(
        fingerprint(program, entry.name), fingerprint(dense, entry.name), data.fingerprint(samples), samples, *options,
        code=Path(__file__).parent,
    )  # fmt: skip
    found: Solutions = {}
    for layer in layers:
        kept = store.get(layer.name)
        if kept is not None:
            found[layer] = {
                name: value.to(program.weights[layer.weight].device) for name, value in kept.items()
            }
    missing = [layer for layer in layers if layer not in found]
    yield Progress("solving layers", len(found), len(layers))
    solved = len(found)
    batches = data.batches(program, entry, samples)
    for item in grams(dense, entry, missing, batches, apart):
        if isinstance(item, Progress):
            yield item
            continue
        layer, *sums = item
        if all(gram.isfinite().all() for gram in sums):
            found[layer] = solve(layer, *sums)
            store.put(layer.name, found[layer])
        solved += 1
        yield Progress("solving layers", solved, len(layers))
    return found

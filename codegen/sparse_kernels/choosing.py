"""Chooses how a weight with zeros is stored: in the format that is read fastest, or densely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from specqd.codegen.isa.base import ISA

from .formats import FORMATS, Format, Stored
from .packing import PRECISIONS

__all__ = ["Choice", "choose", "ranked"]

#: share of zeros from which formats are looked at; what rounding alone makes zero lies below
_LEAST = 0.2
#: how many times faster than the dense one a format must seem
_WORTH = 1.08
#: bytes that a core gets from memory in a cycle, and cycles that expanding a vector takes at least
_BYTES, _CYCLES = 4.0, 4.0


@dataclass(frozen=True)
class Choice:
    """How a stack of alike weights is stored.

    Attributes:
        form: the format, None for the dense layout.
        sizes: elements of the values, masks and starts of each weight, see `formats.Stored`.
        zeros: share of zeros.
        ratio: bytes that are read, to those of the dense layout.
        time: what reading is expected to take, to the time of the dense layout.
        why: why the layout is dense although there are zeros; else nothing.
    """

    form: Format | None
    sizes: tuple[int, int, int] = (0, 0, 0)
    zeros: float = 0.0
    ratio: float = 1.0
    time: float = 1.0
    why: str = ""


def choose(weights: Sequence[Tensor], kind: str, isa: ISA) -> Choice:
    """Choose for weights that one kernel reads one after another; `kind` names the precision."""
    zeros = _zeros(weights, kind)
    if zeros < _LEAST:
        return Choice(None, zeros=zeros)
    if not isa.expands:
        return Choice(None, zeros=zeros, why=f"{isa.name} has no instruction that expands vectors")
    best = ranked(weights, kind)[0]
    if best.time * _WORTH <= 1:
        return best
    gain = f"with {zeros:.0%} zeros {best.ratio:.0%} of the dense bytes would be read, in {best.time:.0%} of the time"
    return Choice(None, zeros=zeros, why=f"no gain on this CPU: {gain}")


def ranked(weights: Sequence[Tensor], kind: str) -> list[Choice]:
    """Return all formats, the fastest first: as memory needs for the bytes, or expanding if that takes longer."""
    precision, choices = PRECISIONS[kind], []
    for at, form in enumerate(FORMATS):
        sizes = [_sizes(weight, kind)[at] for weight in weights]
        values, vectors = (sum(size[part] for size in sizes) for part in (0, 1))
        read = values * precision.bits // 8 + vectors * form.mask_bytes(precision.inputs)
        ratio = read / (vectors * precision.dense_bytes)
        time = max(ratio, _CYCLES * _BYTES / precision.dense_bytes)
        most = max(sizes)  # they differ in values alone
        choices.append(Choice(form, most, _zeros(weights, kind), ratio, time))
    return sorted(choices, key=lambda choice: (choice.time, choice.ratio))


def _zeros(weights: Sequence[Tensor], kind: str) -> float:
    """The share of zeros; each weight is counted once."""
    for weight in weights:
        if kind not in _ZEROS.setdefault(weight, {}):
            elements = PRECISIONS[kind].elements(weight)
            _ZEROS[weight][kind] = 1 - int(elements.count_nonzero()) / max(elements.numel(), 1)
    return float(sum(_ZEROS[weight][kind] for weight in weights) / len(weights))


def _sizes(weight: Tensor, kind: str) -> list[tuple[int, int, int]]:
    """Values, masks and starts of a weight in each of `FORMATS`, counted once."""
    if kind not in _SIZES.setdefault(weight, {}):
        precision = PRECISIONS[kind]
        vectors = precision.vectors(weight)
        blocks, each = vectors.shape[:2]
        stored = (Stored(vectors, form, precision.paired) for form in FORMATS)
        _SIZES[weight][kind] = [(of.size, blocks * each, blocks) for of in stored]
    found: list[tuple[int, int, int]] = _SIZES[weight][kind]
    return found


_ZEROS, _SIZES = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

"""Chooses how a weight with zeros is stored: in the format that is read fastest, or densely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from specqd.codegen.isa.base import ISA

from .formats import FORMATS, Format, values_needed
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
    zeros = sum(_counted(w, kind)["zeros"] for w in weights) / len(weights)
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
    zeros = sum(_counted(w, kind)["zeros"] for w in weights) / len(weights)
    for form in FORMATS:
        counts = [_counted(w, kind, form) for w in weights]
        vectors = sum(c["vectors"] for c in counts)
        values = sum(c[form.name] for c in counts) * precision.bits // 8
        ratio = (values + vectors * form.mask_bytes(precision.inputs)) / (vectors * precision.dense_bytes)
        time = max(ratio, _CYCLES * _BYTES / precision.dense_bytes)
        sizes = tuple(int(max(c[part] for c in counts)) for part in (form.name, "vectors", "blocks"))
        choices.append(Choice(form, sizes, zeros, ratio, time))  # type: ignore[arg-type]
    return sorted(choices, key=lambda choice: (choice.time, choice.ratio))


_COUNTS = WeakTensorKeyDictionary()


def _counted(weight: Tensor, kind: str, form: Format | None = None) -> dict[str, float]:
    """Count a weight's zeros and vectors, and the values that it needs in a format, once."""
    counts: dict[str, float] = _COUNTS.setdefault(weight, {})
    precision = PRECISIONS[kind]
    if "zeros" not in counts:
        elements = precision.elements(weight)
        counts["zeros"] = 1 - int(elements.count_nonzero()) / max(elements.numel(), 1)
    if form is not None and form.name not in counts:
        vectors = precision.vectors(weight)
        counts["blocks"], counts["vectors"] = vectors.shape[0], vectors.shape[0] * vectors.shape[1]
        counts[form.name] = values_needed(vectors, form, precision.paired)
    return counts

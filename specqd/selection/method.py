"""The contract of selection methods, and how they are named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, dataclass_transform

import numpy as np

from specqd.errors import InputError
from specqd.selection.observed import Floats, Ints, Observed

__all__ = ["Method", "best", "method"]


@dataclass_transform(frozen_default=True)
class Method(ABC):
    """Says which tokens of a cache to keep. A subclass becomes a frozen dataclass whose fields are its options.

    Attributes:
        name: in kebab-case.
        needs: what `Observed` must hold: any of "keys", "values", "queries", "rope", "received" and "newest". The last
            two are there if keys and queries are, or `measured`, for "newest" of a window of 1.
    """

    registry: ClassVar[dict[str, type[Method]]] = {}
    name: ClassVar[str]
    needs: ClassVar[Collection[str]] = ()

    def __init_subclass__(cls) -> None:
        """Make a dataclass of the subclass and register its name."""
        dataclass(frozen=True)(cls)
        assert Method.registry.setdefault(cls.name, cls) is cls, f"two methods are named {cls.name}"

    @abstractmethod
    def score(self, observed: Observed) -> Floats:
        """Return float32 [kv_heads, T]; the larger, the rather a token is kept."""

    def choose(self, observed: Observed, candidates: slice, count: int) -> Ints:
        """Return int32 [kv_heads, count]: for each head the slots of `candidates` to keep, in any order."""
        return best(self.score(observed)[:, candidates], count) + np.int32(candidates.start)

    def carry(self, observed: Observed) -> Floats | None:
        """Return float32 [kv_heads, T] for the next selection's `carried`, or None: nothing is to be remembered."""
        return None

    def shares(self, layers: int, mean: float, most: float) -> Sequence[float]:
        """Return how many candidates each layer keeps, from the first, if they keep `mean` on average.

        No layer has more than `most`.
        """
        return [mean] * layers


def best(scores: Floats, count: int) -> Ints:
    """Return int32 [rows, count], ascending: the places of the largest scores of each row; of equal ones the first.

    NaN counts as -inf.
    """
    rows, size = scores.shape
    if not 0 < count < size:
        return np.tile(np.arange(min(count, size), dtype=np.int32), (rows, 1))
    scores = np.fmax(scores, -np.inf)
    least = np.partition(scores, size - count, axis=1)[:, size - count, None]
    above, equal = scores > least, scores == least
    missing = count - above.sum(axis=1, keepdims=True)
    chosen = above | (equal & (equal.cumsum(axis=1) <= missing))
    return np.nonzero(chosen)[1].reshape(rows, count).astype(np.int32)


def method(name: str, **options: Any) -> Method:
    """Make the method of this name.

    `options`: its fields. For `scorer`, which is a method itself, a name will do.

    Raises:
        InputError: there is no such method, or it has no such option, or cannot take its value.
    """
    if name not in Method.registry:
        raise InputError(f"no selection method is named {name!r}; have {', '.join(sorted(Method.registry))}")
    kind = Method.registry[name]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # subclasses are dataclasses
    for option, value in options.items():
        if option not in known:
            raise InputError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
        if option == "scorer" and isinstance(value, str):
            options[option] = method(value)
    return kind(**options)

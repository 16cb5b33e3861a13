"""Compiled graphs with the weights that are bound in them, which `torch.compile(...).aot_compile(...)` can save."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable, SerializableCallable

from specqd.digest import digest
from specqd.errors import InputError

__all__ = ["BoundGraph", "LoadedGraph"]

_CHANGED = "the weights were changed since they were bound; "


class BoundGraph(SerializableCallable):
    """Runs what was compiled as long as the weights are the very tensors that were bound, unchanged; else `eager`."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        weights: Mapping[int, Tensor],
        eager: Callable[..., Any],
        fallback: bool,
    ) -> None:
        """`compiled` takes the inputs that are no weights; `weights` are by their places among all inputs.

        With `fallback`, changed weights are a warning, and `eager` runs; without, they raise InputError.
        """
        self._compiled, self._eager, self._fallback = compiled, eager, fallback
        self._weights = {at: (weight, _version(weight)) for at, weight in weights.items()}
        self._warned = False

    def __call__(self, *given: Any) -> Any:
        """Return the outputs of the graph for all its inputs."""
        weights = self._weights.items()
        if all(given[at] is weight and _version(weight) == version for at, (weight, version) in weights):
            return self._compiled(*(value for at, value in enumerate(given) if at not in self._weights))
        changed = f"{_CHANGED}call torch.compiler.reset() to bind them again"
        if not self._fallback:
            raise InputError(changed)
        if not self._warned:
            warnings.warn(f"specqd runs a graph in eager torch: {changed}", stacklevel=2)
            self._warned = True
        return self._eager(*given)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """Return what `deserialize_compile_artifacts` reads: the artifact inside torch's wrappers, weights' digests."""
        compiled = BundledAOTAutogradSerializableCallable(fn._compiled)
        return _saved(compiled, {at: digest(weight) for at, (weight, _) in fn._weights.items()})

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> LoadedGraph:
        """Return the graph as it was saved."""
        return LoadedGraph.deserialize_compile_artifacts(data)


class LoadedGraph(SerializableCallable):
    """Runs a graph that was saved as long as the weights have the contents that were bound."""

    def __init__(self, compiled: BundledAOTAutogradSerializableCallable, digests: Mapping[int, str]) -> None:
        """`compiled` takes the weights, then the other inputs; `digests` are by places among all inputs."""
        self._compiled, self._digests = compiled, digests
        self._seen: dict[int, tuple[Tensor, int]] = {}

    def __call__(self, *given: Any) -> Any:
        """Return the outputs; raises InputError if a weight is another than was bound."""
        for at, wanted in self._digests.items():
            weight, version = self._seen.get(at, (None, 0))
            if given[at] is weight and _version(given[at]) == version:
                continue
            if digest(given[at]) != wanted:
                raise InputError(f"{_CHANGED}load those, or compile the model again and save that")
            self._seen[at] = given[at], _version(given[at])
        free = (value for at, value in enumerate(given) if at not in self._digests)
        return self._compiled(*(given[at] for at in self._digests), *free)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Any) -> bytes:
        """Save the graph once more."""
        return _saved(fn._compiled, fn._digests)

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> LoadedGraph:
        """Read what was saved of a BoundGraph or a LoadedGraph."""
        compiled, digests = pickle.loads(data)
        return cls(BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(compiled), digests)


def _saved(compiled: BundledAOTAutogradSerializableCallable, digests: Mapping[int, str]) -> bytes:
    return pickle.dumps(
        (BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(compiled), digests)
    )


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version

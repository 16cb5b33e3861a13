"""insert-kv-cache: from stateless causal attention to attention over a declared cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx

from specqd.errors import InputError
from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import arguments, calls, shapes
from specqd.passes.rewrite import declare, replace
from specqd.program import Entry, KVCache, Program

__all__ = ["InsertKVCache"]

_USUAL_CAPACITY = 2048
_ARGUMENTS = ("q", "k", "v", "scale", "layer", "window", "softcap", "sinks")
_Shape = tuple[int, int, int]


class InsertKVCache(Pass):
    """Give every attention layer a place in a cache, so that tokens can be fed a few at a time.

        causal_attention(q, k, v, ...)  ->  cached_attention(q, k, v, kv_k, kv_v, positions, ...)

    1. Layers whose keys and values have one shape share one KVCache. The target's caches are named `kv`,
       `kv2`, ... in order of first use, those of another entry `<entry>_kv`, ...; `layer` becomes the index
       within the cache.
    2. Each cache is two placeholders after `positions`: `<name>_k` and `<name>_v`.
    3. A capacity above the model's number of positions is an InputError; a draft from another checkpoint that
       knows fewer positions than the target gets a cache of so many.

    Attributes:
        capacity: positions a cache holds; 0 means 2048, or all of the model's positions if they are fewer.
        dtype: what keys and values are rounded to when they are written.
    """

    name = "insert-kv-cache"
    for_language_models = True
    capacity: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        """Check the capacity's sign."""
        super().__post_init__()
        if self.capacity < 0:
            raise InputError(
                f"{self.name}: the capacity is {self.capacity}; give at least 1, or 0 for the usual one"
            )

    @property
    def lossless(self) -> bool:
        """Only a float32 cache returns what was put in."""
        return self.dtype == "float32"

    def requires(self, program: Program, entry: Entry) -> str | None:
        """The first two placeholders are the tokens and their positions."""
        names = [str(n.target) for n in entry.graph.nodes if n.op == "placeholder"]
        if names[:2] != ["tokens", "positions"]:
            return f"the inputs begin with {', '.join(names[:2])} instead of tokens, positions"
        return None

    def ensures(self, program: Program, entry: Entry) -> str | None:
        """No attention without a cache is left, and every cache placeholder is declared."""
        stateless = [n.name for n in entry.graph.nodes if calls(n, torch.ops.specqd.causal_attention)]
        if stateless:
            return f"{stateless[0]} still has no cache"
        declared = {f"{name}_{part}" for name in program.caches for part in "kv"} | {"tokens", "positions"}
        unknown = [
            str(n.target) for n in entry.graph.nodes if n.op == "placeholder" and n.target not in declared
        ]
        return f"the input {unknown[0]} is no declared cache" if unknown else None

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Group the layers by shape, declare a cache for each group, and rewrite its layers."""
        layers = [n for n in entry.graph.nodes if calls(n, torch.ops.specqd.causal_attention)]
        if not layers:
            return
        groups = _by_shape(layers, shapes(program, entry))
        positions = entry.graph.find_nodes(op="placeholder")[1]
        for shape, members in groups.items():
            name = _free_name(program, entry)
            capacity = self._capacity(program, entry)
            cache = KVCache(name, len(members), *shape, capacity, self.dtype, self.dtype)
            places = declare(program, entry, cache)
            for index, node in enumerate(members):
                given = arguments(node) | {"layer": index}
                q, k, v, *rest = (given[name] for name in _ARGUMENTS)
                target = torch.ops.specqd.cached_attention.default
                yield replace(node, target, (q, k, v, *places, positions, *rest))

    def _capacity(self, program: Program, entry: Entry) -> int:
        capacity = self._of_target(program)
        return min(capacity, entry.max_positions) if entry.max_positions else capacity

    def _of_target(self, program: Program) -> int:
        most = program.model.max_positions
        if most and self.capacity > most:
            raise InputError(
                f"{self.name}: a capacity of {self.capacity} is more than the {most} positions that this "
                f"{program.model.family} model was made for; give {most} or less"
            )
        return self.capacity or min(_USUAL_CAPACITY, most or _USUAL_CAPACITY)


def _by_shape(layers: list[fx.Node], known: dict[fx.Node, torch.Size]) -> dict[_Shape, list[fx.Node]]:
    groups: dict[_Shape, list[fx.Node]] = {}
    for node in layers:
        _, k, v, *_ = node.args
        (_, heads, _, key), value = known[k], known[v][3]
        groups.setdefault((heads, key, value), []).append(node)
    return groups


def _free_name(program: Program, entry: Entry) -> str:
    base = "kv" if entry.name == program.chain[0] else f"{entry.name}_kv"
    count = 1
    while (name := base if count == 1 else f"{base}{count}") in program.caches:
        count += 1
    return name

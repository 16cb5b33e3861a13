"""quantize-kv: keep the keys and values of a cache in fewer bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx

from specqd.cache_formats import FORMATS
from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import arguments, cache_of, calls
from specqd.passes.rewrite import replace
from specqd.program import Entry, KVCache, Program

__all__ = ["QuantizeKV"]

_Dtype = Literal["keep", "int8"]
_PLAIN = 11  # arguments of cached_attention before those that say how the cache is quantised


class QuantizeKV(Pass):
    """Round keys and values to fewer bits where they are written to a cache; attention reads those.

        cached_attention(q, k, v, kv_k, kv_v, ...)  ->  cached_attention(q, k, v, kv_k, kv_v, ..., int8, int8)

    1. The caches of the entry get the formats, and so do all entries that share them: a cache has one format.
    2. `int8` is symmetric, with a BF16 scale for each position and head.
    3. Refused: attention without a cache, and a cache that is quantised already.

    Attributes:
        keys: what keys are rounded to.
        values: what values are rounded to.
    """

    name = "quantize-kv"
    for_language_models = True
    keys: _Dtype = "int8"
    values: _Dtype = "int8"

    @property
    def lossless(self) -> bool:
        """It rounds, unless it keeps everything."""
        return {self.keys, self.values} == {"keep"}

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Declare the formats of the entry's caches, and round in every entry that uses those."""
        chosen: dict[str, KVCache] = {}
        for node in list(entry.graph.nodes):
            if calls(node, torch.ops.specqd.causal_attention):
                yield Refusal(node.name, "this attention has no cache yet; put insert-kv-cache first")
            elif calls(node, torch.ops.specqd.cached_attention):
                cache = program.caches[cache_of(node)]
                chosen[cache.name] = self._quantised(cache)
                reason = self._unsuitable(cache)
                if reason:
                    yield Refusal(node.name, reason)
        changed = {name for name, cache in chosen.items() if program.caches[name] != cache}
        program.caches |= {name: chosen[name] for name in changed}
        for other in program.entries.values():
            for node in list(other.graph.nodes):
                if calls(node, torch.ops.specqd.cached_attention) and cache_of(node) in changed:
                    yield self._rewrite(node, chosen[cache_of(node)])

    def ensures(self, program: Program, entry: Entry) -> str | None:
        """Every attention rounds to the formats that its cache is declared in."""
        for node in entry.graph.nodes:
            if calls(node, torch.ops.specqd.cached_attention):
                cache, given = program.caches[cache_of(node)], arguments(node)
                if _formats(cache) != (given["key_dtype"], given["value_dtype"]):
                    return f"{node.name} writes other formats to the cache {cache.name} than {cache.dtype}"
        return None

    def _quantised(self, cache: KVCache) -> KVCache:
        if self._unsuitable(cache):
            return cache
        of_keys = cache.key_dtype if self.keys == "keep" else self.keys
        of_values = cache.value_dtype if self.values == "keep" else self.values
        return dataclasses.replace(cache, key_dtype=of_keys, value_dtype=of_values)

    def _unsuitable(self, cache: KVCache) -> str | None:
        if FORMATS[cache.key_dtype].rounded or FORMATS[cache.value_dtype].rounded:
            return f"the cache {cache.name} is quantised already: {cache.dtype}"
        return None

    @staticmethod
    def _rewrite(node: fx.Node, cache: KVCache) -> fx.Node:
        given = (*node.args[:_PLAIN], *_formats(cache), *node.args[_PLAIN + 2 :])
        made = replace(node, torch.ops.specqd.cached_attention.default, given)
        node.graph.erase_node(node)  # it writes to a cache, so that nobody else dares to
        return made


def _formats(cache: KVCache) -> tuple[str, ...]:
    return tuple(d if FORMATS[d].rounded else "" for d in (cache.key_dtype, cache.value_dtype))

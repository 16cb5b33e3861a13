"""quantize-kv: keep the keys and values of a cache in fewer bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx

from specqd.cache_formats import FORMATS
from specqd.errors import InputError
from specqd.manifest import BLOCK
from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import arguments, cache_of, calls, changed
from specqd.passes.rewrite import replace
from specqd.program import Entry, KVCache, Program

__all__ = ["QuantizeKV"]

_Dtype = Literal["keep", "int8", "int4", "turbo3", "turbo4", "turbo5"]
_SPAN = 32  # channels whose codes are packed together


class QuantizeKV(Pass):
    """Round keys and values to fewer bits where they are written to a cache; attention reads those.

        cached_attention(q, k, v, kv_k, kv_v, ...)  ->  cached_attention(q, k, v, kv_k, kv_v, ..., int8, int8)

    1. The caches of the entry get the formats, and so do all entries that share them: a cache has one format.
    2. `int8` is symmetric, with a BF16 scale for each position and head.
    3. `int4` is asymmetric, as KIVI (arXiv 2402.02750): a scale and a zero point, BF16, for each channel of 16
       positions of keys, and for each position of values.
    4. With int4, or with `recent` (KIVI's window), a block of 16 positions is rounded when it is whole. Until then, and
       while it lies no more than `recent` positions before the block of whoever reads it, BF16 is read: what position q
       reads of p depends on nothing but q and p. Other formats are rounded when they are written.
    5. With `rotate`, values of int4 are rotated before, by random signs and a Hadamard transform, and what attention
       makes of them is rotated back (the first step of TurboQuant, arXiv 2504.19874): channels that stand out no longer
       make the steps of all others coarse. Keys have a scale for each channel, and would gain nothing.
    6. `turbo3`, `turbo4` and `turbo5` rotate each key or value alike, and round its channels to the 8, 16 or 32 levels
       that suit a normal distribution best, with a BF16 scale for each position and head (TurboQuant).
    7. MXFP4 is no format of caches: its levels lie densest around zero, where a channel of keys does not, and its
       scales are powers of two (benchmarks/kv_quality.py measures what it would lose).
    8. Refused: attention without a cache, a cache that is quantised already, whole blocks of a cache in which something
       is selected, a rotation of a number of channels that no 8 divides, and `turbo` of one that no 32 divides.

    Attributes:
        keys: what keys are rounded to.
        values: what values are rounded to.
        recent: positions before the block that is written which stay in BF16, as that does; a multiple of 16. With
            some, sequences that begin alike share nothing. With 0, nothing stays but the block itself with int4.
        rotate: rotate values, with int4 values.
    """

    name = "quantize-kv"
    for_language_models = True
    keys: _Dtype = "int8"
    values: _Dtype = "int8"
    recent: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        """Check that recent positions are whole blocks, and what is for int4 alone."""
        super().__post_init__()
        if self.recent < 0 or self.recent % BLOCK:
            raise InputError(
                f"{self.name}: {self.recent} recent positions are no whole blocks: give a multiple of {BLOCK}"
            )
        if self.recent and self.lossless:
            raise InputError(
                f"{self.name}: recent={self.recent} is for what is rounded, and nothing is: leave it out"
            )
        if self.rotate and self.values != "int4":
            raise InputError(
                f"{self.name}: rotate is for int4 values, and they are {self.values} here: leave it out"
            )

    @property
    def lossless(self) -> bool:
        """It rounds, unless it keeps everything."""
        return {self.keys, self.values} == {"keep"}

    @property
    def _recent(self) -> int | None:
        """Positions before the block that is written which stay in BF16; None: every position is rounded at once."""
        whole = any(FORMATS[d].whole_blocks for d in (self.keys, self.values) if d != "keep")
        return self.recent if self.recent or whole else None

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Declare the formats of the entry's caches, and round in every entry that uses those."""
        chosen: dict[str, KVCache] = {}
        for node in list(entry.graph.nodes):
            if calls(node, torch.ops.specqd.causal_attention):
                yield Refusal(node.name, "this attention has no cache yet; put insert-kv-cache first")
            elif calls(node, torch.ops.specqd.cached_attention):
                cache = program.caches[cache_of(node)]
                reason = self._unsuitable(program, cache)
                chosen[cache.name] = cache if reason else self._quantised(cache)
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
                if (cache.recent, cache.rotated) != (given["recent"], given["rotate"]):
                    return f"{node.name} keeps other positions of the cache {cache.name} in BF16, or rotates otherwise"
        return None

    def _quantised(self, cache: KVCache) -> KVCache:
        of_keys = cache.key_dtype if self.keys == "keep" else self.keys
        of_values = cache.value_dtype if self.values == "keep" else self.values
        return dataclasses.replace(
            cache, key_dtype=of_keys, value_dtype=of_values, recent=self._recent, rotated=self.rotate
        )

    def _unsuitable(self, program: Program, cache: KVCache) -> str | None:
        if program.selection and self._recent is not None:
            return (
                f"positions of the cache {cache.name} are selected for {program.selection.entry}, and int4 or recent "
                "positions round whole blocks of the text; choose int8 or turbo formats, or leave select-kv out"
            )
        for part, dtype, channels in (
            ("keys", self.keys, cache.key_dim),
            ("values", self.values, cache.value_dim),
        ):
            if dtype != "keep" and FORMATS[dtype].turned and channels % _SPAN:
                return (
                    f"{part} of the cache {cache.name} have {channels} channels, and {dtype} packs {_SPAN} together; "
                    "choose int8"
                )
        if self.rotate and cache.value_dim % 8:
            return (
                f"values of the cache {cache.name} have {cache.value_dim} channels, and a Hadamard transform needs a "
                "multiple of 8; leave rotate out"
            )
        if FORMATS[cache.key_dtype].rounded or FORMATS[cache.value_dtype].rounded:
            return f"the cache {cache.name} is quantised already: {cache.dtype}"
        return None

    @staticmethod
    def _rewrite(node: fx.Node, cache: KVCache) -> fx.Node:
        of_keys, of_values = _formats(cache)
        given = changed(
            node, key_dtype=of_keys, value_dtype=of_values, recent=cache.recent, rotate=cache.rotated
        )
        made = replace(node, torch.ops.specqd.cached_attention.default, given)
        node.graph.erase_node(node)  # it writes to a cache, so that nobody else dares to
        return made


def _formats(cache: KVCache) -> tuple[str, str]:
    of_keys, of_values = (d if FORMATS[d].rounded else "" for d in (cache.key_dtype, cache.value_dtype))
    return of_keys, of_values

"""share-kv: a draft attends to the target's cache instead of one of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from specqd.passes.contract import Pass, Refusal
from specqd.passes.rewrite import rename_placeholder
from specqd.program import Entry, KVCache, Program

__all__ = ["ShareKV"]


class ShareKV(Pass):
    """Replace an entry's caches by the target's caches of equal shape.

        draft(tokens, positions, draft_kv_k, draft_kv_v)  ->  draft(tokens, positions, kv_k, kv_v)

    The draft then sees the target's keys and values for verified tokens and writes its own for those it
    drafts; the target overwrites them when it verifies. That lifts acceptance, and saves the draft's prefill
    and its cache.

    1. A cache of the entry that the target has in the same shape is replaced, and forgotten if no entry reads
       it.
    2. Refused: the target itself, an entry without caches, one not derived from the target (its keys would
       mean something else), a cache whose shape the target has not, and a cache that is the target's already.
    """

    name = "share-kv"
    for_language_models = True

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Match the entry's caches to the target's, in order."""
        inputs = _inputs(entry)
        own = [c for c in program.caches.values() if f"{c.name}_k" in inputs]
        reason = _unshareable(program, entry, own)
        if reason:
            yield Refusal(next(n.name for n in reversed(entry.graph.nodes) if n.op == "output"), reason)
            return
        of_target = [c for c in program.caches.values() if f"{c.name}_k" in _inputs(program.target)]
        taken = {c.name for c in own}
        for cache in own:
            if cache in of_target:
                yield Refusal(
                    inputs[f"{cache.name}_k"].name, f"the cache {cache.name} is the target's already"
                )
                continue
            like = [
                c
                for c in of_target
                if c.name not in taken and dataclasses.replace(c, name=cache.name) == cache
            ]
            if not like:
                yield Refusal(inputs[f"{cache.name}_k"].name, _no_match(cache, of_target))
                continue
            taken.add(like[0].name)
            for part in "kv":
                yield rename_placeholder(inputs[f"{cache.name}_{part}"], f"{like[0].name}_{part}")
            if not any(f"{cache.name}_k" in _inputs(e) for e in program.entries.values()):
                del program.caches[cache.name]


def _inputs(entry: Entry) -> dict[str, fx.Node]:
    return {str(n.target): n for n in entry.graph.nodes if n.op == "placeholder"}


def _unshareable(program: Program, entry: Entry, own: list[KVCache]) -> str | None:
    ancestor: str | None = entry.name
    while ancestor in program.entries and ancestor != program.chain[0]:
        ancestor = program.entries[ancestor].derived_from
    if entry.name == program.chain[0]:
        return "this is the target, whose cache the others share"
    if ancestor != program.chain[0]:
        return f"{entry.name} is not derived from the target, so keys and values mean something else in it"
    return None if own else f"{entry.name} has no cache to share; put insert-kv-cache first"


def _no_match(cache: KVCache, of_target: list[KVCache]) -> str:
    def shape(c: KVCache) -> str:
        sizes = f"{c.layers} layers x {c.kv_heads} heads x {c.capacity} x {c.key_dim}+{c.value_dim}"
        return f"{c.name} ({sizes}, {c.dtype})"

    have = ", ".join(map(shape, of_target)) or "no cache"
    return f"the target has no free cache of the shape of {shape(cache)}; it has {have}"

"""derive-draft: a draft that starts as a copy of what it drafts for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import fx

from specqd.errors import InputError
from specqd.manifest import OBSERVER
from specqd.passes.contract import Pass, Refusal
from specqd.passes.rewrite import rename_placeholder
from specqd.program import Entry, Program

__all__ = ["DeriveDraft"]


class DeriveDraft(Pass):
    """Copy an entry under a new name and append it to the chain; the two share weights, but no caches.

        target  ->  target, draft

    1. The cache `kv` of the entry becomes `<new name>_kv` of the copy, of the same shape; see share-kv.
    2. One rewrite is counted: the new entry, by its output node.
    3. A name that an entry already has is refused.

    A step that names no entry copies the target, so that `derive-draft{entry=other}` always drafts for the
    target.

    Attributes:
        entry: the new entry's name: letters, digits and `_`.
    """

    name = "derive-draft"
    for_language_models = True
    acts_on: ClassVar[Literal["every entry", "the target"]] = "the target"
    entry: str = "draft"

    def __post_init__(self) -> None:
        """Check the name, which becomes part of placeholder names."""
        super().__post_init__()
        if self.entry == OBSERVER:
            raise InputError(
                f"{self.name}: {OBSERVER!r} is the entry that select-kv derives; choose another name"
            )
        if not self.entry.isidentifier():
            raise InputError(f"{self.name}: {self.entry!r} cannot name an entry; use letters, digits and _")

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Copy the graph, give the copy caches of its own, and append it to the chain."""
        output = next(n for n in reversed(entry.graph.nodes) if n.op == "output")
        if self.entry in program.entries:
            yield Refusal(
                output.name, f"the program has an entry {self.entry!r} already; choose another name"
            )
            return
        copy = entry.copy()
        copy.name, copy.derived_from = self.entry, entry.name
        inputs = {str(n.target): n for n in copy.graph.nodes if n.op == "placeholder"}
        for cache in list(program.caches.values()):
            if f"{cache.name}_k" not in inputs:
                continue
            own = f"{self.entry}_{cache.name.removeprefix(entry.name + '_')}"
            program.caches[own] = dataclasses.replace(cache, name=own)
            for part in "kv":
                rename_placeholder(inputs[f"{cache.name}_{part}"], f"{own}_{part}")
        program.entries[self.entry] = copy
        program.chain += (self.entry,)
        yield next(n for n in reversed(copy.graph.nodes) if n.op == "output")

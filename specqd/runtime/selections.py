"""What an artifact selects of the target's cache: nothing, for a draft, or in the target itself."""

from __future__ import annotations

from collections.abc import Callable

from specqd.errors import InputError
from specqd.manifest import BLOCK, Manifest
from specqd.runtime import draft_selection
from specqd.runtime.binding import Memory
from specqd.runtime.blocks import BlockTables
from specqd.runtime.draft_selection import DraftSelection
from specqd.runtime.target_selection import TargetSelection

__all__ = ["drops", "selection_of", "tables_size"]


def drops(manifest: Manifest) -> bool:
    """Whether the target forgets positions, so that a text may be longer than its cache."""
    return manifest.selection is not None and manifest.selection.entry == manifest.chain[0]


def tables_size(manifest: Manifest) -> int:
    """Entries that a sequence needs for tables beside its own."""
    selection = manifest.selection
    return 0 if selection is None or drops(manifest) else draft_selection.tables_size(manifest, selection)


def selection_of(
    manifest: Manifest, tables: BlockTables, memory: Memory, find: Callable[[str], Callable[..., None]]
) -> DraftSelection | TargetSelection | None:
    """Make what selects positions; `find` looks compiled functions up.

    Raises:
        InputError: the cache is too small for what is kept and what comes until the next selection.
    """
    selection, slots = manifest.selection, min(manifest.capacity, tables.pool * BLOCK)
    if selection is None:
        return None
    if not drops(manifest):
        return DraftSelection(manifest, selection, tables, memory)
    if slots < selection.tokens + selection.every:
        raise InputError(
            f"the cache holds {slots} positions, and the artifact selects {selection.tokens} of "
            f"{selection.tokens + selection.every}: load it with more `cache_tokens`, or compile with a larger "
            "`--context` or a smaller `every`"
        )
    return TargetSelection(manifest, selection, tables, memory, find)

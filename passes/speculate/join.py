"""Join another model's program to a target's, as an entry that drafts for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specqd.errors import InputError
from specqd.program import Program

__all__ = ["join"]

#: parts of tokenizer.json that decide which tokens a text becomes
_DECIDES = ("normalizer", "pre_tokenizer", "model", "added_tokens")


def join(program: Program, other: Program, name: str) -> Program:
    """Return `program` with the target of `other` as a further entry `name` at the end of its chain.

        target, draft  +  target'  ->  target, draft, name

    Weights of `other` are renamed `<name>.<weight>`; nothing is shared. Both must be captured, without caches: the
    passes that follow give every entry its own. Numbers of tokens may differ by padding, as long as the tokenizers
    are the same.

    Raises:
        InputError: the name is taken or no identifier, the tokenizers differ, or `other` has caches already.
    """
    if not name.isidentifier() or name in program.entries:
        taken = f"; the program has {', '.join(program.entries)}" if name in program.entries else ""
        raise InputError(
            f"{name!r} cannot name the draft: use letters, digits and _, and no entry's name{taken}"
        )
    if program.caches or other.caches:
        raise InputError(
            f"join the draft {name} before insert-kv-cache: the two models need caches of their own"
        )
    reason = _differ(program, other)
    if reason:
        raise InputError(f"{other.model.source or name} cannot draft for this model: {reason}")
    joined, entry = program.copy(), other.target.copy()
    entry.name, entry.derived_from = name, None
    entry.vocab_size, entry.max_positions = other.model.vocab_size, other.model.max_positions
    for node in entry.graph.nodes:
        if node.op == "get_attr":
            joined.weights[f"{name}.{node.target}"] = other.weights[str(node.target)]
            node.target = f"{name}.{node.target}"
    joined.entries[name] = entry
    joined.chain += (name,)
    return joined


def _differ(program: Program, other: Program) -> str | None:
    """Say how the two tokenizers differ; padded vocabularies of one tokenizer are alike."""
    ours, theirs = (_tokenizer(p.model.tokenizer_files) for p in (program, other))
    if ours is None or theirs is None:
        if program.model.vocab_size == other.model.vocab_size:
            return None
        return (
            f"it knows {other.model.vocab_size} tokens and the target {program.model.vocab_size}, and without "
            "both tokenizers nothing shows that the ids mean the same; put tokenizer.json into both folders"
        )
    for part in _DECIDES:
        mine, its = (_without_options(t.get(part), part) for t in (ours, theirs))
        if mine != its:
            return f"the {part.replace('_', ' ')} of its tokenizer is another; a draft needs the target's tokenizer"
    return None


def _tokenizer(files: tuple[str, ...]) -> dict[str, Any] | None:
    found = next((Path(file) for file in files if Path(file).name == "tokenizer.json"), None)
    return None if found is None else json.loads(found.read_text(encoding="utf-8"))


def _without_options(part: Any, name: str) -> Any:
    """Leave out what does not change ids: dropout and the like are training's."""
    if name != "model" or not isinstance(part, dict):
        return part
    return {key: part.get(key) for key in ("type", "vocab", "merges", "byte_fallback", "ignore_merges")}

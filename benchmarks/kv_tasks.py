"""Texts whose ends need their beginnings: held-out files, and needles to be found in unrelated text."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "LONG", "Sample", "long_prompts", "retrieval"]

LONG = "long prompts"
KINDS = {"passkey": 1, "needles": 4, "key-value": 10}
"""Kinds of questions, by how many numbers there are to take for the answer."""

_NAMES = ["amber", "birch", "cobalt", "delta", "ember", "falcon", "garnet", "harbor", "indigo", "juniper", "kestrel",
          "lotus"]  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A text of which the first `end` tokens are compressed, and whose tokens in `scored` are then predicted.

    None of these is the one right after `end`: the last token before it still saw the whole cache.
    """

    task: str
    name: str
    seed: int
    tokens: Sequence[int]
    end: int
    scored: range


def long_prompts(file: Path, tokenizer: Any, seeds: int, scored: int) -> list[Sample]:
    """Cut each long text of the file once for each seed.

    The cuts divide the second half of a text evenly, so that no two seeds score the same token.
    """
    with file.open(encoding="utf-8") as lines:
        texts = {row["id"]: tokenizer.encode(row["text"]) for row in map(json.loads, lines)}
    found = []
    for name, tokens in texts.items():
        step = len(tokens) // 2 // seeds
        if step > scored:
            ends = [len(tokens) - step * (seeds - seed) for seed in range(seeds)]
            found += [
                Sample(LONG, name, seed, tokens, end, range(end + 1, end + 1 + scored))
                for seed, end in enumerate(ends)
            ]
    return found


def retrieval(tokenizer: Any, counts: Mapping[int, int], asked_before: bool) -> list[Sample]:
    """Make passkey, key-value and multi-needle questions: for each length so many seeds of each.

    They are plain text, which small models complete better than they answer in a chat.
    `asked_before`: whether the question is in the text when the cache is compressed, or comes after.
    """
    return [
        _question(tokenizer, kind, length, seed, asked_before)
        for length, seeds in counts.items()
        for seed in range(seeds)
        for kind in KINDS
    ]


def _question(tokenizer: Any, kind: str, length: int, seed: int, asked_before: bool) -> Sample:
    rng = random.Random(f"{kind} {length} {seed}")
    names = rng.sample(_NAMES, KINDS[kind])
    values = {name: str(rng.randrange(10000, 100000)) for name in names}
    wanted = rng.choice(names)
    if kind == "passkey":
        thing, lead = "pass key", "The pass key is "
        needles = ["The pass key is {0}. Remember it: {0} is the pass key.".format(values[wanted])]
    else:
        thing, lead = f"{wanted} code", f"{wanted}: "
        needles = [f"{name}: {values[name]}" for name in names]
    if kind == "key-value":
        needles = ["\n".join(needles)]
    told = f"Some text hides information. Find and remember it.\n\n{_bury(tokenizer, needles, length, rng)}"
    question = f"\n\nWhat is the {thing}?\n\n"
    before, after = (told + question, lead) if asked_before else (told, question + lead)
    prefix, rest, answer = (
        tokenizer.encode(part, add_special_tokens=False) for part in (before, after, values[wanted])
    )
    start = len(prefix) + len(rest)
    when = "asked before" if asked_before else "asked after"
    scored = range(start, start + len(answer))
    return Sample(when, f"{kind} {length}", seed, [*prefix, *rest, *answer], len(prefix), scored)


def _bury(tokenizer: Any, needles: Sequence[str], length: int, rng: random.Random) -> str:
    """Spread needles over paragraphs of Python's help topics, `length` tokens in all, less 120 for what is around."""
    from pydoc_data.topics import topics

    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if 40 < len(p) < 600]
    rng.shuffle(paragraphs)
    room = length - 120 - len(tokenizer.encode("\n\n".join(needles)))
    chosen: list[str] = []
    for paragraph in paragraphs:
        room -= len(tokenizer.encode(paragraph)) + 1
        if room < 0:
            break
        chosen.append(paragraph)
    for needle in needles:
        chosen.insert(rng.randrange(len(chosen) + 1), needle)
    return "\n\n".join(chosen)

"""What each level would say along the target's own answers: enough to play any plan without running a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specqd.runtime.engine import Engine

__all__ = ["DEPTH", "Recording", "Run", "record"]

DEPTH = 15  # tokens of a run at most: what the draft-length rules ask for at most
_BEYOND = 4  # tokens recorded after the first that the target would not choose


@dataclass(frozen=True)
class Run:
    """How a level continues a text when it decodes alone: greedy tokens, their probabilities and entropies (nats)."""

    tokens: tuple[int, ...]
    doubts: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Recording:
    """One prompt: `text` is the prompt (the first `prompt` tokens) and the target's greedy answer.

    `runs[entry][n]` continues the first n tokens of the text; there is one for each n past the prompt. It is what
    that draft would propose to the target there, with the cache that it would have there.
    """

    prompt: int
    text: tuple[int, ...]
    runs: dict[str, dict[int, Run]]


def record(engine: Engine, prompt: Sequence[int], answer: Sequence[int], drafts: Sequence[str]) -> Recording:
    """Let each of `drafts` continue the text from everywhere in the answer, the target's first token aside."""
    target = engine.manifest.chain[0]
    text = (*prompt, *answer)
    runs: dict[str, dict[int, Run]] = {}
    for draft in drafts:
        # Last the target: who shares its cache must find there what the target writes.
        for entry in (draft, target):
            _feed(engine, entry, text)
        runs[draft] = {}
        # From the end: what a run writes lies behind all that the runs after it read.
        for n in range(len(text) - 1, len(prompt), -1):
            _go_back(engine, (draft, target), text, n - 1)
            runs[draft][n] = _run(engine, draft, text, n)
    return Recording(len(prompt), text, runs)


def _go_back(engine: Engine, entries: Sequence[str], text: Sequence[int], position: int) -> None:
    """Feed again, entry by entry, what is read to go on at a position and is not in the caches any more."""
    start = min(engine.recent.reached(entry, 0, position) for entry in entries)
    if start < position:
        for entry in entries:
            _feed(engine, entry, text[: position + 1], start)


def _feed(engine: Engine, entry: str, text: Sequence[int], done: int = 0) -> None:
    """Fill the caches of an entry with all of the text but its last token, of which the first `done` are there."""
    while done < len(text) - 1:
        rows = max(size for size in engine.rows(entry) if size <= len(text) - 1 - done)
        engine.feed(entry, text[done : done + rows], done)
        done += rows


def _run(engine: Engine, entry: str, text: Sequence[int], length: int) -> Run:
    """Continue the first `length` tokens, whose caches are filled up to the last of them."""
    tokens, doubts, agreed = list[int](), list[tuple[float, float]](), 0
    while len(tokens) < min(DEPTH, agreed + 1 + _BEYOND):
        at = length - 1 + len(tokens)
        if not engine.room(entry, at):
            break
        output = engine.feed(entry, [tokens[-1] if tokens else text[at]], at)
        if agreed == len(tokens) and text[at + 1 : at + 2] == (output.token(0),):
            agreed += 1
        tokens.append(output.token(0))
        doubts.append(output.confidence(0))
    return Run(tuple(tokens), tuple(doubts))

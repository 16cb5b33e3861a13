"""Greedy decoding, plain or with a draft: the same tokens either way."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from specqd.errors import InputError
from specqd.runtime.drafting import DraftLength, FixedLength
from specqd.runtime.engine import Engine

__all__ = ["Stats", "decode"]


@dataclass
class Stats:
    """What one generation did; filled in while it runs.

    `rounds` are target passes after the prefill. `drafted` counts the tokens that a draft proposed,
    `accepted` those that the target chose too, `examined` those whose acceptance was decided: what follows
    a rejected token is dropped unseen. `finish` is one of eos, length, context, and "" while running or
    when broken off.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    examined: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: str = ""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the time until the first new token was known."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens but the first (the prefill gives it) over the time they took."""
        return max(0, self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the examined draft tokens that the target chose too; None without a draft."""
        return self.accepted / self.examined if self.examined else None

    @property
    def tokens_per_verify(self) -> float | None:
        """New tokens a target pass, the prefill's aside; None before the first."""
        return max(0, self.new_tokens - 1) / self.rounds if self.rounds else None


def decode(
    engine: Engine,
    prompt: Sequence[int],
    stats: Stats,
    *,
    max_new_tokens: int,
    draft_length: DraftLength | None = None,
    stop: Collection[int] = (),
) -> Iterator[list[int]]:
    """Yield the greedy continuation of `prompt` in lists of one or more tokens, each as soon as it is known.

    Ends after `max_new_tokens`, after a token of `stop` (which is yielded) or when the cache is full.
    `draft_length` says how many tokens to draft each round (None: plain decoding).

    Raises:
        InputError: the prompt is empty or does not fit the cache.
    """
    _demand_room(engine, prompt, max_new_tokens)
    stats.prompt_tokens = len(prompt)
    began = time.perf_counter()
    sequence = _Sequence(engine, stats, draft_length, stop)
    new = [sequence.prefill(prompt)]
    stats.prefill_seconds = time.perf_counter() - began
    while True:
        stats.new_tokens += len(new)
        stats.finish = _finish(engine, stats, new[-1], max_new_tokens, stop)
        yield new
        if stats.finish:
            return
        began = time.perf_counter()
        new = sequence.round(max_new_tokens - stats.new_tokens)
        stats.decode_seconds += time.perf_counter() - began


def _demand_room(engine: Engine, prompt: Sequence[int], max_new_tokens: int) -> None:
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    if len(prompt) > engine.capacity:
        raise InputError(
            f"the prompt has {len(prompt)} tokens and the cache holds {engine.capacity}: shorten it, or "
            f"compile with `--context {len(prompt) + max_new_tokens}`"
        )
    if max_new_tokens < 1:
        raise InputError(f"cannot generate {max_new_tokens} tokens: ask for 1 or more")


def _finish(engine: Engine, stats: Stats, last: int, limit: int, stop: Collection[int]) -> str:
    if last in stop:
        return "eos"
    if stats.new_tokens >= limit:
        return "length"
    # The newest token is not in the cache yet and needs a place there to be continued.
    return "context" if stats.prompt_tokens + stats.new_tokens > engine.capacity else ""


class _Sequence:
    """One sequence in the engine's caches: tokens up to the pending last one, which is not in the cache yet.

    Invariant between rounds: the target's cache holds positions 0 to len(tokens) - 2, and the draft's cache
    the first `_drafted_to` of them. A draft that shares the target's caches is up to date by itself.
    """

    def __init__(
        self, engine: Engine, stats: Stats, draft_length: DraftLength | None, stop: Collection[int]
    ) -> None:
        self._engine = engine
        self._stats = stats
        self._stop = stop
        self._target, *drafts = engine.manifest.chain
        self._draft = drafts[0] if drafts and draft_length else ""
        self._length = draft_length if drafts and draft_length else FixedLength(0)
        self._tokens: list[int] = []
        self._drafted_to = 0
        self._verify_rows = frozenset(engine.rows(self._target, every_row=True))
        caches = engine.manifest.sizes
        self._shared = (
            not self._draft or caches("cache", self._draft).keys() <= caches("cache", self._target).keys()
        )

    def prefill(self, prompt: Sequence[int]) -> int:
        """Feed the prompt to the target; return the token after it."""
        self._tokens = list(prompt)
        self._tokens.append(self._feed(self._target, 0, len(prompt)))
        return self._tokens[-1]

    def round(self, room: int) -> list[int]:
        """Draft, verify, and return the tokens that are now certain: 1 to `room`, none after a stop token."""
        at = len(self._tokens) - 1
        began = time.perf_counter()
        drafts = self._propose(min(self._length.choose(), room - 1, self._engine.capacity - at - 1))
        drafted = time.perf_counter()
        chosen = self._engine.step(self._target, [self._tokens[at], *drafts], at).tolist()
        verified = time.perf_counter()
        agreed = next((i for i, token in enumerate(drafts) if token != chosen[i]), len(drafts))
        self._length.learn(len(drafts), agreed, drafted - began, verified - drafted)
        new = chosen[: agreed + 1]
        ends = [i for i, token in enumerate(new) if token in self._stop]
        if ends:
            new = new[: ends[0] + 1]
            agreed = min(agreed, len(new))
        self._stats.rounds += 1
        self._stats.drafted += len(drafts)
        self._stats.accepted += agreed
        self._stats.examined += min(agreed + 1, len(drafts))
        self._tokens += new
        if drafts:
            # The draft has fed itself the pending token and all drafts but the last.
            self._drafted_to = at + min(agreed + 1, len(drafts))
        return new

    def _propose(self, length: int) -> list[int]:
        """Let the draft continue by up to `length` tokens, no further than a stop token."""
        while length > 0 and length + 1 not in self._verify_rows:
            length -= 1
        if length <= 0:
            return []
        at = len(self._tokens) - 1
        drafts = [self._feed(self._draft, at if self._shared else self._drafted_to, at + 1)]
        while len(drafts) < length and not (
            drafts[-1] in self._stop and len(drafts) + 1 in self._verify_rows
        ):
            drafts.append(int(self._engine.step(self._draft, drafts[-1:], at + len(drafts))[-1]))
        return drafts

    def _feed(self, entry: str, begin: int, end: int) -> int:
        """Feed positions `begin` to `end - 1` in the largest pieces there are; return the next token."""
        after = -1
        for rows in reversed(self._engine.rows(entry)):
            while end - begin >= rows:
                after = int(self._engine.step(entry, self._tokens[begin : begin + rows], begin)[-1])
                begin += rows
        return after

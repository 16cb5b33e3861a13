"""Decoding one sequence, plainly or with drafts: the tokens are the same (or equally distributed) either way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from specqd.errors import InputError
from specqd.runtime.asking import LevelStats, Steps
from specqd.runtime.engine import Engine
from specqd.runtime.levels import Verifier
from specqd.runtime.sharing import Sharing

__all__ = ["Decoding", "Stats", "demand_prompt"]


@dataclass
class Stats:
    """What one generation did; filled in while it runs.

    `reused_tokens` of the prompt were not fed, since the caches held them from an earlier one that began alike.
    `rounds` are target passes after the prefill. `drafts` are the levels that draft for the target itself,
    `levels` all below it. `compiled_seconds` is the part of `decode_seconds` spent in compiled code. `finish` is
    one of eos, stop (a stop string was met), length, context, cancelled, and "" while running or when broken off by an
    exception.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compiled_seconds: float = 0.0
    finish: str = ""
    drafts: tuple[LevelStats, ...] = ()
    levels: tuple[LevelStats, ...] = field(default=(), repr=False)

    @property
    def drafted(self) -> int:
        """Tokens that were proposed to the target."""
        return sum(level.proposed for level in self.drafts)

    @property
    def examined(self) -> int:
        """Of those, the ones decided on: what follows a rejected token is dropped unseen."""
        return sum(level.examined for level in self.drafts)

    @property
    def accepted(self) -> int:
        """Of those, the ones that the target chose too."""
        return sum(level.accepted for level in self.drafts)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens that were fed over the time until the first new token was known."""
        fed = self.prompt_tokens - self.reused_tokens
        return fed / self.prefill_seconds if self.prefill_seconds else 0.0

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


class Decoding:
    """One sequence on its way: each `advance` makes some more tokens certain, until `stats.finish` says why it ended.

    It ends after `max_new_tokens`, after a token of the target's `stop` (which is given) or when the cache is full.
    `busy` gives the seconds that compiled code has worked, for the figures. What others have of the prompt is not
    fed again (`sharing`), if the engine shares prefixes.

    Raises:
        InputError: the prompt is empty or does not fit the cache.
    """

    def __init__(
        self,
        engine: Engine,
        target: Verifier,
        prompt: Sequence[int],
        stats: Stats,
        max_new_tokens: int,
        busy: Callable[[], float] | None = None,
    ) -> None:
        demand_prompt(engine, prompt, max_new_tokens)
        self.stats, self._engine, self._target, self._limit = stats, engine, target, max_new_tokens
        self._text = list(prompt)
        self.sharing = Sharing(engine, target, list(prompt)) if engine.prefix_sharing else None
        self._busy = busy or (lambda: engine.seconds)
        stats.prompt_tokens = len(prompt)
        stats.drafts = tuple(source.level.stats for source in target.below)
        stats.levels = _all_levels(target)

    def enter(self, sequence: int, positions: int) -> bool:
        """Begin on a sequence of the engine that holds nothing, with blocks for so many positions set aside.

        If there are too few, say False; the sequence must then be released.
        """
        if self.sharing is None:
            return self._engine.tables.reserve(sequence, positions)
        reused = self.sharing.enter(sequence, positions)
        self.stats.reused_tokens = reused or 0
        return reused is not None

    def leave(self) -> None:
        """Leave what the sequence holds of the text to others; to be called before it is released."""
        if self.sharing is not None:
            self.sharing.note(self._text, rest=True)

    def advance(self) -> Steps[list[int]]:
        """Ask for what is needed and end with the next tokens, one or more; the first time, of the prompt."""
        stats, target = self.stats, self._target
        began, busy = time.perf_counter(), self._busy()
        if not stats.new_tokens:
            new = [(yield from target.prefill(self._text))]
            stats.prefill_seconds += time.perf_counter() - began
        else:
            new = yield from target.round(self._text, self._limit - stats.new_tokens)
            stats.rounds += 1
            stats.decode_seconds += time.perf_counter() - began
            stats.compiled_seconds += self._busy() - busy
        if self.sharing is not None:
            self.sharing.note(self._text, rest=not stats.new_tokens)
        stats.new_tokens += len(new)
        stats.finish = _finish(self._engine, stats, new[-1].token, self._limit, target.stop)
        return [one.token for one in new]


def _all_levels(verifier: Verifier) -> tuple[LevelStats, ...]:
    found: list[LevelStats] = []
    for source in verifier.below:
        found.append(source.level.stats)
        if isinstance(source.level, Verifier):
            found += _all_levels(source.level)
    return tuple(found)


def demand_prompt(engine: Engine, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raise InputError unless there are a prompt, of known tokens, that fits the cache, and tokens to make."""
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    if len(prompt) > engine.capacity:
        wanted, budget = len(prompt) + max_new_tokens, engine.capacity < engine.manifest.capacity
        remedy = f"load with `cache_tokens={wanted}`" if budget else f"compile with `--context {wanted}`"
        raise InputError(
            f"the prompt has {len(prompt)} tokens and the cache holds {engine.capacity}: shorten it, or {remedy}"
        )
    known = engine.vocab_size
    if min(prompt) < 0 or max(prompt) >= known:
        wrong = next(token for token in prompt if not 0 <= token < known)
        raise InputError(f"token {wrong} is not in the model's vocabulary of {known}")
    if max_new_tokens < 1:
        raise InputError(f"cannot generate {max_new_tokens} tokens: ask for 1 or more")


def _finish(engine: Engine, stats: Stats, last: int, limit: int, stop: Collection[int]) -> str:
    if last in stop:
        return "eos"
    if stats.new_tokens >= limit:
        return "length"
    # The newest token is not in the cache yet and needs a place there to be continued.
    return "context" if stats.prompt_tokens + stats.new_tokens > engine.capacity else ""

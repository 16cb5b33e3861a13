"""Prompts answered plainly and by the artifact's plan, and the figures of `specqd bench` that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from specqd.runtime.engine import Engine
from specqd.runtime.generate import Stats
from specqd.runtime.model import Model

__all__ = ["Answer", "answer", "decoding", "levels"]


@dataclass(frozen=True)
class Answer:
    """One prompt answered both ways."""

    plain: Stats
    speculative: Stats
    bytes_per_s: float  # read by the plain steps
    identical: bool


def answer(model: Model, prompt: Sequence[int], new_tokens: int) -> Answer:
    """Answer a prompt with exactly `new_tokens` tokens."""
    engine = model.engine
    plain = model.generate(prompt, new_tokens, speculate=False, ignore_eos=True)
    speculative = model.generate(prompt, new_tokens, ignore_eos=True)
    ends = range(len(prompt) + 1, len(prompt) + len(plain.tokens))
    read = sum(engine.step_bytes(engine.manifest.chain[0], 1, end) for end in ends)
    return Answer(
        plain=plain.stats,
        speculative=speculative.stats,
        bytes_per_s=read / plain.stats.decode_seconds,
        identical=plain.tokens == speculative.tokens,
    )


def decoding(answers: Sequence[Answer], gbps: float) -> dict[str, Any]:
    """Figures of all answers together."""
    plain, fast = [one.plain for one in answers], [one.speculative for one in answers]
    rates = [(a.decode_tokens_per_s, b.decode_tokens_per_s) for a, b in zip(plain, fast, strict=True)]
    examined, rounds = sum(s.examined for s in fast), sum(s.rounds for s in fast)
    seconds, compiled = sum(s.decode_seconds for s in fast), sum(s.compiled_seconds for s in fast)
    return {
        "plain_tokens_per_s": median(a for a, _ in rates),
        "plain_bandwidth_fraction": median(one.bytes_per_s for one in answers) / 1e9 / gbps,
        "speculative_tokens_per_s": median(b for _, b in rates),
        "speedup": median(b / a for a, b in rates),
        "acceptance_rate": sum(s.accepted for s in fast) / examined if examined else None,
        "tokens_per_verify": sum(s.new_tokens - 1 for s in fast) / rounds,
        "drafted_per_verify": sum(s.drafted for s in fast) / rounds,
        "overhead_fraction": 1 - compiled / seconds,
        "identical": all(one.identical for one in answers),
        "prompts": len(answers),
        "tokens_compared": sum(s.new_tokens for s in fast),
    }


def levels(answers: Sequence[Answer], engine: Engine) -> list[dict[str, Any]]:
    """Sum up each level of the plan over the answers.

    `kind` is `search` (no model runs), `shared_cache` (an entry that works on the target's cache) or `own_cache`.
    `cost` is the time of one of its own passes, of however many rows, over a plain step of the target; `acceptance`
    is `accepted` over `examined`, None if no token was.
    """
    plain = sum(one.plain.decode_seconds for one in answers) / sum(one.plain.rounds for one in answers)
    found = []
    for same in zip(*(one.speculative.levels for one in answers), strict=True):
        passes, examined = sum(one.passes for one in same), sum(one.examined for one in same)
        accepted = sum(one.accepted for one in same)
        found.append(
            {
                "name": same[0].name,
                "kind": _kind(engine, same[0].name),
                "acceptance": accepted / examined if examined else None,
                "cost": sum(one.seconds for one in same) / passes / plain if passes else None,
                "passes": passes,
                "proposed": sum(one.proposed for one in same),
                "examined": examined,
                "accepted": accepted,
            }
        )
    return found


def _kind(engine: Engine, name: str) -> str:
    if name not in engine.entries:
        return "search"
    caches = engine.manifest.sizes("cache", name)
    shared = caches.keys() <= engine.manifest.sizes("cache", engine.manifest.chain[0]).keys()
    return "shared_cache" if shared else "own_cache"

"""specqd's side of the benchmarks: each method is one measurement, of a second or a few."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from specqd.bandwidth import Bandwidth
from specqd.runtime.model import load
from specqd.runtime.sampling import Sampling

__all__ = ["Compiled", "loops"]

Sample = dict[str, float]


def loops(tokens: Sequence[int]) -> bool:
    """Say whether the last 64 tokens repeat themselves every 32 or fewer."""
    end = tokens[-64:]
    return len(end) == 64 and any(end[period:] == end[:-period] for period in range(1, 33))


class Compiled:
    """A loaded artifact."""

    def __init__(self, artifact: Path, threads: int | None) -> None:
        self.model = load(artifact, threads, prefix_sharing=False)
        self.engine = self.model.engine
        self.target, *drafts = self.engine.manifest.chain
        self.draft = drafts[0] if drafts else None
        self.plan = self.engine.manifest.plan
        self.verify_rows = [
            rows for rows in range(1, 9) if rows in self.engine.rows(self.target, every_row=True)
        ]
        self._answers: dict[tuple[tuple[int, ...], Sampling | None], list[int]] = {}
        self.identical = True

    def bandwidth(self) -> Sample:
        """Stream-read rate of a buffer that no cache holds."""
        return {"GB/s": Bandwidth(self.engine).gbps}

    def decode(
        self, prompt: Sequence[int], new_tokens: int, plan: str = "target", sampling: Sampling | None = None
    ) -> Sample:
        """Answer a prompt by a plan, plainly if that is but the target; compare the tokens with all earlier answers.

        `loops`: 1 if the answer ends in a loop; `outside`: the share of its time outside compiled code.
        """
        answer = self.model.generate(prompt, new_tokens, plan=plan, sampling=sampling, ignore_eos=True)
        known = self._answers.setdefault((tuple(prompt), sampling), answer.tokens)
        self.identical &= all(a == b for a, b in zip(known, answer.tokens, strict=False))
        if len(answer.tokens) > len(known):
            self._answers[tuple(prompt), sampling] = answer.tokens
        stats = answer.stats
        return {
            "tokens/s": stats.decode_tokens_per_s,
            "accepted": stats.accepted,
            "examined": stats.examined,
            "verified": stats.rounds,
            "new": stats.new_tokens - 1,
            "loops": float(loops(answer.tokens)),
            "outside": 1 - stats.compiled_seconds / stats.decode_seconds,
        }

    def passes(self, prompt: Sequence[int], at: int, repeats: int) -> Sample:
        """Seconds of a target pass by row count ("1" to "8") and of a "draft" step, at position `at`."""
        tokens = [*prompt] * (at // len(prompt) + 1)
        self.model.generate(tokens[:at], 1)
        rows = (tokens * 8)[:8]
        times: dict[str, list[float]] = {}
        for _ in range(repeats):
            for count in self.verify_rows:
                times.setdefault(str(count), []).append(self._time(self.target, rows[:count], at))
        if self.draft:
            # As when drafting: one step after the other, so that the draft's weights push each other out of
            # the caches, not the target's.
            times["draft"] = [self._time(self.draft, rows[:1], at) for _ in range(8 * repeats)]
        return {name: median(taken) for name, taken in times.items()}

    def prefill(self, tokens: Sequence[int]) -> Sample:
        """Rate of a prompt alone."""
        return {"tokens/s": self.model.generate(tokens, 1).stats.prefill_tokens_per_s}

    def bytes(self, entry: str, end: int) -> int:
        """Bytes of weights and cache of one step at position `end`."""
        return self.engine.step_bytes(entry, 1, end)

    def _time(self, entry: str, tokens: Sequence[int], at: int) -> float:
        began = time.perf_counter()
        self.engine.step(entry, tokens, at)
        return time.perf_counter() - began

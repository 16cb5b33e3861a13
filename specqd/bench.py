"""The figures of `specqd bench`: how fast an artifact decodes, against what memory allows, and whether right.

What is compared is run alternately, so that a machine that slows down slows both. Figures are medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from specqd.bandwidth import Bandwidth
from specqd.errors import InputError
from specqd.fresh_process import load_seconds, peak_rss_mb
from specqd.prompts import PASSAGE, PROMPTS
from specqd.runtime.cpu import cpu_name
from specqd.runtime.model import Model, load

__all__ = ["run"]

Progress = Callable[[str, int, int], None]

_VERIFY_ROWS = range(1, 9)
_PREFILL = 512  # tokens


@dataclass(frozen=True)
class _Plan:
    prompts: tuple[str, ...]
    new_tokens: int
    steps: int  # timed steps of the draft and at each row count
    processes: int  # fresh processes for loading


def run(
    directory: str | Path,
    *,
    prompts: int | None = None,
    new_tokens: int = 128,
    quick: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an artifact; return figures by name (`_per_s`: of a second, `_fraction`: of `bandwidth_gbps`).

    `prompts` of the built-in set are answered with `new_tokens` tokens each, end-of-sequence tokens
    ignored, plainly and speculatively; `identical` says whether all tokens were equal. A bytes figure
    counts each weight array that a step reads once, and the cache up to its position.

    Raises:
        InputError: an option is out of range, or the cache is too small for the prompts.
        ArtifactError: the artifact cannot be loaded.
    """
    plan = _plan(prompts, new_tokens, quick)
    tell = progress or (lambda what, done, of: None)
    model = load(directory, threads)
    _demand_room(model, plan)
    tell("loading in fresh processes", 0, 0)
    loads = [load_seconds(Path(directory)) for _ in range(plan.processes)]
    rss = peak_rss_mb(Path(directory), plan.prompts[0], plan.new_tokens)
    bandwidth = Bandwidth(model.engine)
    answers = _answers(model, plan, bandwidth, tell)
    tell("timing single steps", 0, 0)
    gbps = bandwidth.gbps
    return {
        "bandwidth_gbps": gbps,
        "bandwidth_source": bandwidth.source,
        **_decoding(answers, gbps),
        **_draft_steps(model, plan, gbps),
        "verify_cost": _verify_cost(model, plan),
        "prefill_tokens_per_s": _prefill(model, plan),
        "load_s": median(loads),
        "peak_rss_mb": rss,
        "weights_mb": sum(model.engine.manifest.sizes("weight").values()) / 1e6,
        "threads": model.engine.threads,
        "cpu": cpu_name(),
        "isa": model.engine.manifest.isa,
        "pipeline": model.engine.manifest.pipeline,
    }


def _plan(prompts: int | None, new_tokens: int, quick: bool) -> _Plan:
    count = prompts if prompts is not None else 4 if quick else len(PROMPTS)
    if not 1 <= count <= len(PROMPTS):
        raise InputError(
            f"there are {len(PROMPTS)} built-in prompts: ask for 1 to {len(PROMPTS)}, not {count}"
        )
    if new_tokens < 2:
        raise InputError(f"{new_tokens} new tokens give no rate: ask for 2 or more")
    return _Plan(PROMPTS[:count], new_tokens, steps=16 if quick else 96, processes=1 if quick else 5)


def _demand_room(model: Model, plan: _Plan) -> None:
    longest = max(len(model.encode(prompt)) for prompt in plan.prompts)
    needed = longest + max(plan.new_tokens, max(_VERIFY_ROWS))
    if needed > model.engine.capacity:
        raise InputError(
            f"measuring takes {needed} positions and the cache holds {model.engine.capacity}: ask for fewer "
            f"`--tokens`, or compile with `--context {needed}`"
        )


@dataclass(frozen=True)
class _Answer:
    """One prompt answered both ways."""

    plain_per_s: float
    speculative_per_s: float
    bytes_per_s: float  # read by the plain steps
    identical: bool
    drafted: int
    examined: int
    accepted: int
    rounds: int
    new_tokens: int


def _answers(model: Model, plan: _Plan, bandwidth: Bandwidth, tell: Progress) -> list[_Answer]:
    model.generate(model.encode(plan.prompts[0]), 8, ignore_eos=True)  # reads the weights from disk
    answers = []
    for done, prompt in enumerate(plan.prompts):
        tell("answering prompts", done, len(plan.prompts))
        bandwidth.measure()
        answers.append(_answer(model, model.encode(prompt), plan.new_tokens))
    return answers


def _answer(model: Model, prompt: Sequence[int], new_tokens: int) -> _Answer:
    engine = model.engine
    plain = model.generate(prompt, new_tokens, speculate=False, ignore_eos=True)
    speculative = model.generate(prompt, new_tokens, ignore_eos=True)
    ends = range(len(prompt) + 1, len(prompt) + len(plain.tokens))
    read = sum(engine.step_bytes(engine.manifest.chain[0], 1, end) for end in ends)
    stats = speculative.stats
    return _Answer(
        plain_per_s=plain.stats.decode_tokens_per_s,
        speculative_per_s=stats.decode_tokens_per_s,
        bytes_per_s=read / plain.stats.decode_seconds,
        identical=plain.tokens == speculative.tokens,
        drafted=stats.drafted,
        examined=stats.examined,
        accepted=stats.accepted,
        rounds=stats.rounds,
        new_tokens=stats.new_tokens,
    )


def _decoding(answers: list[_Answer], gbps: float) -> dict[str, Any]:
    examined, rounds = sum(a.examined for a in answers), sum(a.rounds for a in answers)
    return {
        "plain_tokens_per_s": median(a.plain_per_s for a in answers),
        "plain_bandwidth_fraction": median(a.bytes_per_s for a in answers) / 1e9 / gbps,
        "speculative_tokens_per_s": median(a.speculative_per_s for a in answers),
        "speedup": median(a.speculative_per_s / a.plain_per_s for a in answers),
        "acceptance_rate": sum(a.accepted for a in answers) / examined if examined else None,
        "tokens_per_verify": sum(a.new_tokens - 1 for a in answers) / rounds,
        "drafted_per_verify": sum(a.drafted for a in answers) / rounds,
        "identical": all(a.identical for a in answers),
        "prompts": len(answers),
        "tokens_compared": sum(a.new_tokens for a in answers),
    }


def _draft_steps(model: Model, plan: _Plan, gbps: float) -> dict[str, Any]:
    """Time single draft steps after the first prompt, as if the draft decoded alone."""
    engine = model.engine
    if len(engine.manifest.chain) < 2:
        return {"draft_tokens_per_s": None, "draft_bandwidth_fraction": None}
    draft, tokens = engine.manifest.chain[1], _prefilled(model, plan)
    seconds, read = [], []
    for i in range(plan.steps):
        at = min(len(tokens) + i, engine.capacity - 1)
        seconds.append(_time(model, draft, 1, at))
        read.append(engine.step_bytes(draft, 1, at + 1) / seconds[-1])
    return {
        "draft_tokens_per_s": 1 / median(seconds),
        "draft_bandwidth_fraction": median(read) / 1e9 / gbps,
    }


def _verify_cost(model: Model, plan: _Plan) -> list[float]:
    """Time of a target pass with 1 to 8 rows over one with 1 row: the median over rounds of all eight."""
    target, tokens = model.engine.manifest.chain[0], _prefilled(model, plan)
    sizes = [rows for rows in _VERIFY_ROWS if rows in model.engine.rows(target, every_row=True)]
    ratios: dict[int, list[float]] = {rows: [] for rows in sizes}
    for _ in range(plan.steps // 4):
        taken = {rows: _time(model, target, rows, len(tokens)) for rows in sizes}
        for rows in sizes:
            ratios[rows].append(taken[rows] / taken[1])
    return [median(ratios[rows]) for rows in sizes]


def _prefill(model: Model, plan: _Plan) -> float:
    tokens = (model.text.encode(PASSAGE * 8) * 8)[: min(_PREFILL, model.engine.capacity)]
    rates = [model.generate(tokens, 1).stats.prefill_tokens_per_s for _ in range(max(3, plan.steps // 16))]
    return median(rates)


def _prefilled(model: Model, plan: _Plan) -> list[int]:
    tokens = model.encode(plan.prompts[0])
    model.generate(tokens, 1)
    return tokens


def _time(model: Model, entry: str, rows: int, at: int) -> float:
    tokens = [1] * rows
    began = time.perf_counter()
    model.engine.step(entry, tokens, at)
    return time.perf_counter() - began

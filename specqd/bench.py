"""The figures of `specqd bench`: how fast an artifact decodes, against what memory allows, and whether right.

What is compared is run alternately, so that a machine that slows down slows both. Figures are medians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from specqd.bandwidth import Bandwidth
from specqd.bench_answers import Answer, answer, decoding, levels
from specqd.bench_passes import VERIFY_ROWS, draft_steps, prefill, verify_cost
from specqd.errors import InputError
from specqd.fresh_process import load_seconds, peak_rss_mb
from specqd.prompts import PROMPTS
from specqd.runtime.cpu import cpu_name
from specqd.runtime.model import Model, load

__all__ = ["run"]

Progress = Callable[[str, int, int], None]


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
    ignored, plainly and by the artifact's `plan`; `identical` says whether all tokens were equal. A bytes figure
    counts each weight array that a step reads once, and the cache up to its position. `planned_speedup` is what
    `specqd tune` predicted of the plan (None: the artifact was not tuned); `levels` are those of the plan, as
    `specqd.bench_answers.levels` says; `overhead_fraction` is the part of the time of decoding by the plan that is
    not spent in compiled code.

    Raises:
        InputError: an option is out of range, or the cache is too small for the prompts.
        ArtifactError: the artifact cannot be loaded.
    """
    plan = _plan(prompts, new_tokens, quick)
    tell = progress or (lambda what, done, of: None)
    model = load(directory, threads, prefix_sharing=False)
    _demand_room(model, plan)
    tell("loading in fresh processes", 0, 0)
    loads = [load_seconds(Path(directory)) for _ in range(plan.processes)]
    rss = peak_rss_mb(Path(directory), plan.prompts[0], plan.new_tokens)
    bandwidth = Bandwidth(model.engine)
    answers = _answers(model, plan, bandwidth, tell)
    tell("timing single steps", 0, 0)
    gbps, first = bandwidth.gbps, model.encode(plan.prompts[0])
    return {
        "bandwidth_gbps": gbps,
        "bandwidth_source": bandwidth.source,
        **decoding(answers, gbps),
        "levels": levels(answers, model.engine),
        "plan": str(model.plan),
        "planned_speedup": model.engine.manifest.planned_speedup,
        **draft_steps(model, first, plan.steps, gbps),
        "verify_cost": verify_cost(model, first, plan.steps // 4),
        "prefill_tokens_per_s": prefill(model, max(3, plan.steps // 16)),
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
    needed = longest + max(plan.new_tokens, VERIFY_ROWS[-1])
    if needed > model.engine.capacity:
        raise InputError(
            f"measuring takes {needed} positions and the cache holds {model.engine.capacity}: ask for fewer "
            f"`--tokens`, or compile with `--context {needed}`"
        )


def _answers(model: Model, plan: _Plan, bandwidth: Bandwidth, tell: Progress) -> list[Answer]:
    model.generate(model.encode(plan.prompts[0]), 8, ignore_eos=True)  # reads the weights from disk
    answers = []
    for done, prompt in enumerate(plan.prompts):
        tell("answering prompts", done, len(plan.prompts))
        bandwidth.measure()
        answers.append(answer(model, model.encode(prompt), plan.new_tokens))
    return answers

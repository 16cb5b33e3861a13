"""What decoding loses when another process keeps a core busy, for each way of choosing threads.

In rounds of all combinations: nobody else or one busy process pinned to a core; the engine's adaptive choice
up to all CPUs (in the first answer, while it learns, and in the next), all CPUs always, one thread always; plain
and speculative.

    python benchmarks/contention.py
    python benchmarks/contention.py --model FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import report
from compiled import Compiled, Sample
from machine import Quiet
from subject import add_options, prepare, prompts

from specqd.runtime.crowding import Crowding
from specqd.runtime.threads import ThreadChoice

_BUSY = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"
_MODES = ("plain", "speculative")


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    compiled = Compiled(subject.artifact, options.threads)
    most = compiled.engine.threads
    if most < 2:
        raise SystemExit("one CPU leaves no choice of threads: nothing to measure")
    texts = prompts(subject, compiled.model)
    compiled.decode(texts[0], 8, compiled.plan)  # reads the weights from disk
    quiet = Quiet()
    rounds = [
        _round(compiled, quiet, texts[i % len(texts)], options.new_tokens) for i in range(options.rounds)
    ]
    details = {
        "model": subject.name,
        "rounds": options.rounds,
        "new tokens": options.new_tokens,
        "threads": most,
        "isa": compiled.engine.manifest.isa,
        "identical": compiled.identical,
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write(f"contention-{subject.name}", _tables(rounds, most), details, rounds, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure decoding beside a busy process.")
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of one prompt each")
    parser.add_argument("-n", "--new-tokens", type=int, default=96, help="new tokens a run")
    report.add_options(parser)
    return parser.parse_args()


def _choices(most: int) -> dict[str, ThreadChoice]:
    """Fresh choosers: the engine's own, while it learns and then, and two that are fixed."""
    fixed, adaptive = ThreadChoice(most), ThreadChoice(most, Crowding())
    fixed.counts = (most,)
    return {
        f"up to {most}, first answer": adaptive,
        f"up to {most}, later answer": adaptive,
        f"{most} fixed": fixed,
        "1 fixed": ThreadChoice(1),
    }


def _round(compiled: Compiled, quiet: Quiet, prompt: list[int], new_tokens: int) -> dict[str, list[Sample]]:
    done: dict[str, list[Sample]] = {}
    for state in ("quiet", "busy"):
        with _neighbour() if state == "busy" else contextlib.nullcontext() as pid:
            quiet.pids |= {pid} if pid else set()
            for threads, choice in _choices(compiled.engine.threads).items():
                compiled.engine._choice = choice
                for mode in _MODES:
                    plan = compiled.plan if mode == "speculative" else compiled.target
                    sample = quiet(lambda plan=plan: compiled.decode(prompt, new_tokens, plan))
                    done[f"{threads}, {mode}, {state}"] = [sample]
            quiet.pids -= {pid}
    return done


@contextlib.contextmanager
def _neighbour() -> Iterator[int]:
    """Keep one core busy."""
    code = _BUSY % min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.2)  # the scheduler moves what ran there
        try:
            yield process.pid
        finally:
            process.kill()


def _tables(rounds: list[dict[str, list[Sample]]], most: int) -> list[report.Table]:
    rates = {name: [done[name][0]["tokens/s"] for done in rounds] for name in rounds[0]}
    figures = {name: report.spread(values) for name, values in rates.items()}
    rows = []
    for threads in _choices(most):
        shown = [
            figures[f"{threads}, {mode}, {state}"].show(1) for state in ("quiet", "busy") for mode in _MODES
        ]
        versus = [
            median(
                a / b
                for a, b in zip(
                    rates[f"{threads}, {mode}, busy"], rates[f"1 fixed, {mode}, busy"], strict=True
                )
            )
            for mode in _MODES
        ]
        rows.append([threads, *shown, " / ".join(f"{ratio:.2f}" for ratio in versus)])
    headings = ["threads", *(f"{mode}, {state}" for state in ("quiet", "one core busy") for mode in _MODES),
                "busy, over 1 fixed (plain / speculative)"]  # fmt: skip
    return [report.Table("Tokens/s:", headings, rows, {"tokens/s": figures})]


if __name__ == "__main__":
    main()

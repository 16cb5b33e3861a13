"""`specqd tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specqd.cli.app import ArtifactDir, Threads, app
from specqd.cli.progress import progress_bar

if TYPE_CHECKING:
    from specqd.planning.levels import LevelCost
    from specqd.planning.tuning import Tuned

__all__ = ["tune"]

_ROWS = (2, 4, 8, 16)  # of a verify pass, in the table of costs


@app.command()
def tune(
    directory: ArtifactDir,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Tune for these: a prompt a line, or .jsonl with a "text" a line, continued as it is; at most 8 are '
            "used, and of long ones the end. (default: built-in questions)",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("-n", "--tokens", metavar="N", help="New tokens a prompt, at most.")
    ] = 128,
    threads: Threads = None,
) -> None:
    """Find how this artifact speculates fastest on this machine, and let it do so.

    Measures its levels, predicts the speed of many plans, runs the best, and stores the fastest in the artifact, or
    plain decoding if no plan pays. The answers stay the same. Ctrl-C leaves the artifact as it was.

    Example: specqd tune smollm2.specqd
    """
    from specqd.planning.prompt_file import builtin_prompts, read_prompts
    from specqd.planning.tuning import tune as find_plan

    texts, raw = read_prompts(prompts) if prompts else (builtin_prompts(), False)
    with progress_bar() as tell:
        tuned = find_plan(directory, texts, new_tokens=new_tokens, threads=threads, raw=raw, progress=tell)
    _show(directory, tuned)


def _show(directory: Path, tuned: Tuned) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=80, highlight=False)
    levels = Table(title="Levels: passes in plain steps of the target")
    levels.add_column("level", no_wrap=True)
    for heading in ("accepted", "step", *(f"{rows} rows" for rows in _ROWS)):
        levels.add_column(heading, justify="right")
    for level in tuned.levels:
        levels.add_row(*_level(level))
    plans = Table(title=f"The best of {tuned.considered} plans, times faster than plain decoding")
    plans.add_column("plan")
    for heading in ("predicted", "measured", "error", "tokens/s"):
        plans.add_column(heading, justify="right", no_wrap=True)
    for trial in tuned.trials:
        gains = f"{trial.predicted:.2f}", f"{trial.measured:.2f}"
        plans.add_row(trial.plan, *gains, f"{trial.error:+.0%}", f"{trial.tokens_per_s:.1f}")
    plans.add_row("plain", "", "1.00", "", f"{tuned.plain_tokens_per_s:.1f}")
    console.print(levels, plans, sep="\n")
    console.print(
        f"{tuned.prompts} prompts, {tuned.tokens} tokens, the same whatever the plan.", soft_wrap=True
    )
    if " <- " in tuned.plan:
        console.print(f"stored in {directory}: {tuned.plan}", soft_wrap=True, markup=False)
    else:
        console.print(
            f"no plan pays here: {directory} decodes plainly from now on", soft_wrap=True, markup=False
        )


def _level(level: LevelCost) -> list[str]:
    accepted = "" if level.acceptance is None else f"{level.acceptance:.0%}"
    passes = (f"{level.passes[rows]:.2f}" if rows in level.passes else "" for rows in _ROWS)
    return [level.name, accepted, f"{level.step:.2f}", *passes]

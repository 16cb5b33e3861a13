"""`specqd bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from specqd.cli.app import ArtifactDir, Threads, app
from specqd.cli.progress import progress_bar

__all__ = ["bench"]


@app.command()
def bench(
    directory: ArtifactDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    prompts: Annotated[
        int | None,
        typer.Option(metavar="N", help="Use N of the built-in prompts. (default: all)", show_default=False),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("-n", "--tokens", metavar="N", help="New tokens a prompt.")
    ] = 128,
    quick: Annotated[
        bool, typer.Option("--quick", help="4 prompts and few repetitions: rough figures.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Measure an artifact: bandwidth, decoding with and without draft, loading.

    Plain and speculative runs alternate, and their tokens are compared.

    Example: specqd bench smollm2.specqd --json
    """
    from specqd.bench import run

    with progress_bar(not as_json) as tell:
        figures = run(
            directory, prompts=prompts, new_tokens=new_tokens, quick=quick, threads=threads, progress=tell
        )
    if as_json:
        import json

        print(json.dumps(figures, indent=2))
        return
    levels = figures.pop("levels")
    for name, value in figures.items():
        shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else value
        print(f"{name:<28} {_shown(shown)}")
    for level in levels:
        print(f"{'level':<28} {', '.join(f'{name} {_shown(value)}' for name, value in level.items())}")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

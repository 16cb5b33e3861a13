"""`specqd bench`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from specqd.artifact import open_artifact
from specqd.cli.app import ArtifactDir, Threads, app, read_sizes
from specqd.cli.progress import progress_bar
from specqd.errors import InputError

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
        int | None,
        typer.Option(
            "-n", "--tokens", metavar="N", help="New tokens a prompt. (default: 128)", show_default=False
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="4 prompts and few repetitions: rough figures.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of a module: the .pt2 file it was compiled from, to compare with eager torch and others.",
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Of a module: a dynamic size; `specqd inspect` names them."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Measure an artifact: bandwidth, decoding with and without draft, loading.

    Plain and speculative runs alternate, and their tokens are compared. Of a module that is no language model, the
    latency, in turns with that of other engines.

    Example: specqd bench smollm2.specqd --json
    """
    of_module = open_artifact(directory).manifest.module is not None
    with progress_bar(not as_json) as tell:
        if of_module:
            if prompts is not None or new_tokens is not None:
                raise InputError(f"{directory} is no language model, which --prompts and --tokens are for")
            from specqd.bench_module import run_module

            figures = run_module(
                directory,
                against=against,
                quick=quick,
                threads=threads,
                sizes=read_sizes(size),
                progress=tell,
            )
        else:
            if against or size:
                raise InputError(f"{directory} is a language model, which --against and --size are not for")
            from specqd.bench import run

            figures = run(
                directory,
                prompts=prompts,
                new_tokens=128 if new_tokens is None else new_tokens,
                quick=quick,
                threads=threads,
                progress=tell,
            )
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    print("\n".join(_of_module(figures) if of_module else _of_model(figures)))


def _of_model(figures: dict[str, Any]) -> Iterator[str]:
    for name, value in figures.items():
        if name != "levels":
            shown = ", ".join(f"{v:.2f}" for v in value) if isinstance(value, list) else value
            yield f"{name:<28} {_shown(shown)}"
    for level in figures["levels"]:
        yield f"{'level':<28} {', '.join(f'{name} {_shown(value)}' for name, value in level.items())}"


def _of_module(figures: dict[str, Any]) -> Iterator[str]:
    yield f"{figures['cpu']}, {figures['isa']}, {figures['threads']} threads; {', '.join(figures['inputs'])}"
    yield f"{'engine':<14}{'ms':>10}{'times ours':>12}{'difference':>12}"
    for name, ms in figures["ms"].items():
        ratio, difference = figures["ratios"].get(name), figures["differences"].get(name)
        yield (
            f"{name:<14}{ms:>10.3f}{'' if ratio is None else f'{ratio:.2f}':>12}"
            f"{'' if difference is None else f'{difference:.2g}':>12}"
        )
    for name, why in figures["left_out"].items():
        yield f"{name} is left out: {why}"[:80]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""`specqd profile`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specqd.cli.app import ArtifactDir, Threads, app, read_sizes
from specqd.cli.progress import progress_bar

if TYPE_CHECKING:
    from specqd.profile import Profile

__all__ = ["profile"]

_WIDTH = 80


@app.command()
def profile(
    directory: ArtifactDir,
    runs: Annotated[int, typer.Option("-r", "--runs", metavar="N", help="Runs; times are medians.")] = 30,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="A dynamic size of a module; `specqd inspect` names them."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the times into a picture too, such as times.png."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Say where the time goes: each kernel of a module, or each pass of a language model.

    `of peak` is of the multiplications and additions that this CPU does a second in registers, in float32; `of memory`
    of the bytes that it reads a second from memory, which data in a cache can exceed. Both are measured beside.

    Example: specqd profile resnet.specqd --plot times.png
    """
    from specqd.profile import profile as measure

    with progress_bar(not as_json) as tell:
        found = measure(directory, runs=runs, threads=threads, sizes=read_sizes(size), progress=tell)
    if plot:
        from specqd.profile_plot import draw

        draw(found, plot)
    if as_json:
        print(json.dumps(found.figures(), indent=2))
        return
    print("\n".join(_table(found)))


def _table(found: Profile) -> Iterator[str]:
    total = sum(row.seconds for row in found.rows)
    of_model = any(row.operator == "pass" for row in found.rows)
    yield f"{found.cpu}, {found.isa}, {found.peaks.threads} threads"
    yield f"peak {found.peaks.gflops:.0f} GFLOP/s in float32, memory {found.peaks.gbps:.1f} GB/s"
    if not of_model:
        yield f"a run takes {found.run_seconds * 1e3:.3f} ms, its kernels {total * 1e3:.3f} ms when timed one by one"
    yield ""
    yield f"{'kernel':<18}{'calls':>5}{'ms':>9}{'share':>7}{'of peak':>9}{'of memory':>11}  what"
    for row in found.rows:
        peak = "" if row.gflops is None else f"{row.gflops / found.peaks.gflops:.0%}"
        share = "" if of_model else f"{row.seconds / total:.1%}"
        line = (
            f"{row.name:<18.18}{row.calls:>5}{row.seconds * 1e3:>9.3f}{share:>7}{peak:>9}"
            f"{row.gbps / found.peaks.gbps:>11.0%}  {row.module or row.operator}"
        )
        yield line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."

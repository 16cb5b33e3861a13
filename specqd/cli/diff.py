"""`specqd diff`."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer

from specqd.cli.app import ModelPath, app
from specqd.cli.progress import progress_bar

__all__ = ["diff"]

_WIDTH = 80


@app.command()
def diff(
    first: ModelPath,
    second: ModelPath,
    entry: Annotated[
        str | None, typer.Option(metavar="NAME", help="The entry. (default: the target)")
    ] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say only whether they differ.")] = False,
) -> None:
    """Say what two models compute differently, module by module.

    Lines begin with - for what only the first one has, + for the second, ~ for what changed.
    Exits with 0 if they are the same, 1 if they differ, 2 if one cannot be read.

    Example: specqd diff before.pt2 after.pt2
    """
    import specqd
    from specqd.graph_diff import diff_programs

    with progress_bar() as tell:
        tell("capturing the models", 0, 0)
        changes = diff_programs(specqd.capture(first), specqd.capture(second), entry)
    if not changes:
        print("they compute the same in the same way")
        return
    if quiet:
        print(f"they differ in {len(changes)} places")
        raise typer.Exit(1)
    for module, group in groupby(changes, key=lambda change: change.module):
        print(f"@@ {module or 'the model'}"[:_WIDTH])
        for change in group:
            lines = [f"{change.sign} {change.what}", f"  -> {change.became}"]
            for line in lines if change.became else lines[:1]:
                print(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}...")
    raise typer.Exit(1)

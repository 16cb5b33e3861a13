"""`specqd rewrite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specqd.cli.app import ModelPath, app
from specqd.cli.progress import progress_bar
from specqd.errors import InputError

__all__ = ["rewrite"]


@app.command()
def rewrite(
    model: ModelPath,
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="Passes to run, as text; see `specqd passes`.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Write the result, a .pt2 file.", show_default=False
        ),
    ] = None,
    entry: Annotated[
        str | None, typer.Option(metavar="NAME", help="The entry to write. (default: the target)")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the graph before and after each pass as a page.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files that are there.")] = False,
    why: Annotated[bool, typer.Option("--why", help="Print each refusal with its reason.")] = False,
) -> None:
    """Run passes on a model and write what it has become, without compiling it.

    What is written can be read by `torch.export.load`, by `specqd.capture` and by this command again.

    Example: specqd rewrite vit.pt2 "fuse-attention, fold-constants" -o fused.pt2
    """
    import specqd
    from specqd.html_view import Stages
    from specqd.passes.watchers import diff
    from specqd.saving import save_exported

    for file in filter(None, (output, html)):
        if file.exists() and not force:
            raise InputError(f"{file} is there already: remove it, or give --force")
    steps = specqd.Pipeline.parse(pipeline)
    lines: list[str] = []
    stages = Stages()
    with progress_bar() as tell:
        tell("capturing the model", 0, 0)
        before = specqd.capture(model)
        watchers = [diff(lines.append), stages] if html else [diff(lines.append)]
        after = steps(before, *watchers, tell=tell)
        if html:
            html.write_text(stages.page(f"{Path(model).name}: {steps}"), "utf-8")
        if output:
            tell("writing the model", 0, 0)
            save_exported(after, output, entry)
    print("\n".join(lines))
    refused = [(event.step, *refusal) for event in after.history for refusal in event.refused]
    for step, node, reason in refused if why else ():
        print(f"{step} left {node} alone: {reason}")
    if refused and not why:
        print(f"{len(refused)} nodes were left alone; --why says which and why")
    if output:
        print(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")

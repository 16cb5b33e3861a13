"""`specqd explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from specqd.cli.app import ModelPath, app
from specqd.cli.progress import progress_bar

__all__ = ["explain"]


@app.command()
def explain(
    model: ModelPath,
    pipeline: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="Passes to run, as text.", show_default=False)
    ],
) -> None:
    """Say for every node what each pass did with it, or why it refused.

    Example: specqd explain ./my-model "derive-draft, draft: cast-mxfp4"
    """
    import specqd

    with progress_bar() as tell:
        tell("capturing the model", 0, 0)
        report = specqd.explain(model, pipeline)
    print(report)

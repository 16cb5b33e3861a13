"""The typer application that the verbs attach themselves to, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ArtifactDir", "Threads", "app"]

app = typer.Typer(
    name="specqd",
    help="Compile a checkpoint for this CPU, with a small draft of itself that makes it decode faster.\n\n"
    "Start with `specqd demo`, or compile a model of yours and ask it something:\n\n"
    "  specqd compile ./my-model -o my-model.specqd\n\n"
    "  specqd generate my-model.specqd -p 'Why is the sky blue?'",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ArtifactDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="An artifact made by `specqd compile`.", show_default=False)
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Use at most N threads. (default: the CPUs it may use)",
        show_default=False,
    ),
]

"""The typer application that the verbs attach themselves to, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

__all__ = ["ArtifactDir", "ModelPath", "Threads", "app"]

_ORDER = (
    "demo",
    "compile",
    "generate",
    "tune",
    "bench",
    "profile",
    "inspect",
    "explain",
    "rewrite",
    "diff",
    "passes",
    "synthesize-images",
    "fetch",
)


class _InOrderOfUse(TyperGroup):
    """Lists what a newcomer needs first at the top."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order in which the help shows them."""
        verbs = super().list_commands(ctx)
        return [verb for verb in _ORDER if verb in verbs] + [verb for verb in verbs if verb not in _ORDER]


app = typer.Typer(
    name="specqd",
    cls=_InOrderOfUse,
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
ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt2 or .onnx file, a Hugging Face folder, a .gguf file or a hub id.",
        show_default=False,
    ),
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

"""The typer application that the verbs attach themselves to, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specqd.errors import InputError

__all__ = ["ArtifactDir", "ModelPath", "Threads", "app", "read_named", "read_sizes"]

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


def read_named(option: str, texts: Sequence[str] | None, form: str) -> dict[str, str]:
    """Read what an option that takes `NAME=TEXT` was given; `form` says what one looks like.

    Raises InputError for a text that is not of that form, or a name given twice.
    """
    named: dict[str, str] = {}
    for text in texts or ():
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise InputError(f"cannot read {option} {text!r}: write {form}")
        if name in named:
            raise InputError(f"{option} gives {name!r} twice: give it once")
        named[name] = value
    return named


def read_sizes(texts: Sequence[str] | None) -> dict[str, int]:
    """Read what `--size` was given, as `read_named` does."""
    form = "NAME=N, such as batch=1"
    sizes = {}
    for name, number in read_named("--size", texts, form).items():
        if not (number.isascii() and number.isdecimal()):
            raise InputError(f"cannot read --size {name}={number}: write {form}")
        sizes[name] = int(number)
    return sizes

"""`specqd passes`."""

from __future__ import annotations

import inspect
import textwrap
from typing import Annotated

import typer

from specqd.cli.app import app

__all__ = ["passes"]


@app.command()
def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this pass in full.", show_default=False)
    ] = None,
) -> None:
    """List the passes that a pipeline can name, with their options.

    Example: specqd passes cast-mxfp4
    """
    from specqd.passes import options, registered
    from specqd.passes.registry import find

    shown = [find(name)] if name else list(registered().values())
    for kind in shown:
        doc = inspect.cleandoc(kind.__doc__ or "")
        print(kind.name)
        if name:
            print(textwrap.indent(doc.partition("\n\nAttributes:")[0], "    "))
        else:
            _say(doc.partition("\n\n")[0])
        for option in options(kind):
            _say(f"{option.name}={option.default!r}  ({option.choices})  {option.doc}", more="    ")
        print()
    if not name:
        print("In a pipeline: pass{option=value}, commas between; `draft: pass` for one entry.")


def _say(text: str, more: str = "") -> None:
    """Print a paragraph under a pass's name, its later lines indented by `more` beyond the first."""
    print(textwrap.fill(text, 80, initial_indent="    ", subsequent_indent=f"    {more}"))

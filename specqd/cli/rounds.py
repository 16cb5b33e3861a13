"""`specqd generate --explain-speculation`: what was drafted, and what became of it, a line a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specqd.runtime.asking import Round
    from specqd.runtime.text import Text

__all__ = ["printer"]

_LEGEND = "level <- its draft, how many drafts stood: which stood [which fell] > its own"


def printer(text: Text) -> Callable[[Round], None]:
    """Return what prints a round to standard error, in colour on a terminal; signs say the same without.

        target <- draft 3/5:  blue because of[ the sky] >  a

    Green: stood; red and struck out: fell; bold: what the verifying level chose itself.
    """
    from rich.console import Console
    from rich.text import Text as Line

    console = Console(stderr=True, highlight=False)
    console.print(_LEGEND, style="dim", markup=False)

    def show(one: Round) -> None:
        pairs = zip(one.drafts, one.new, strict=False)
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        line = Line(f"{one.level} <- {one.below} {count}/{len(one.drafts)}: ", style="dim")
        line.append(_words(text, one.drafts[:count]), style="not dim green")
        if fallen := one.drafts[count:]:
            line.append("[", style="dim")
            line.append(_words(text, fallen), style="not dim red strike")
            line.append("]", style="dim")
        if chosen := one.new[count:]:
            line.append(" > ", style="dim")
            line.append(_words(text, chosen), style="not dim bold")
        console.print(line)

    return show


def _words(text: Text, tokens: Sequence[int]) -> str:
    """Return the text of tokens on one line; those without text, such as special tokens, as their ids."""
    words, before = "", ""
    for i, token in enumerate(tokens, 1):
        now = text.decode(tokens[:i])
        words += now[len(before) :] or f"<{token}>"
        before = now
    return words.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")

"""A page that shows a program's graphs before and after each pass; one file, which opens without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from torch import fx

from specqd.graph_diff import called, formatted
from specqd.passes import Applied
from specqd.program import Entry, module_of

__all__ = ["Stages"]

_STYLE = """
:root { color-scheme: light dark; --gone: #fbd5d5; --new: #cdf0d5; --kept: #f7e9b8; }
@media (prefers-color-scheme: dark) { :root { --gone: #5c2323; --new: #1f4a2b; --kept: #544815; } }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; }
section { border-top: 1px solid #8886; margin-top: 1rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.sides > div { min-width: 0; }
h2 { font-size: 1.1rem; margin: .6rem 0 .3rem; } h3 { font-size: .8rem; margin: .2rem 0; opacity: .7; }
details { margin-left: .8rem; } summary { cursor: pointer; } summary small { opacity: .6; }
code { display: block; font-size: 12px; margin-left: 1rem; overflow-wrap: anywhere; border-radius: 3px; }
.gone { background: var(--gone); } .new { background: var(--new); } .refused { background: var(--kept); }
li { font-size: .85rem; }
#only:checked ~ main code:not(.gone, .new, .refused), #only:checked ~ main details:not(:has(.gone, .new, .refused))
{ display: none; }
"""


@dataclass(frozen=True)
class _Stage:
    title: str
    before: Entry
    after: Entry
    refused: dict[str, str]


@dataclass
class Stages:
    """Keeps what each step of a pipeline did; a watcher.

    Attributes:
        steps: what is shown, a section for each step and entry.
    """

    steps: list[_Stage] = field(default_factory=list)

    def __call__(self, applied: Applied) -> None:
        """Keep the entry before and after a step, and an entry that the step derived."""
        result, old, new = applied.result, applied.before.entries, applied.result.program.entries
        refused = {r.node: r.why for r in result.refusals}
        counts = f"{result.rewrites} rewrites, {len(refused)} nodes refused"
        title = f"{applied.number + 1}. {applied.step} on {result.entry}"
        self.steps.append(_Stage(f"{title}: {counts}", old[result.entry], new[result.entry], refused))
        for name in new.keys() - old.keys():
            origin = old.get(str(new[name].derived_from), new[name])
            self.steps.append(_Stage(f"{title} made {name}", origin, new[name], {}))

    def page(self, title: str) -> str:
        """Give the page as HTML."""
        sections = "\n".join(map(_section, self.steps))
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
            '<input type="checkbox" id="only"><label for="only"> only what passes took, made or refused</label>\n'
            f"<main>{sections}</main></body></html>\n"
        )


def _section(stage: _Stage) -> str:
    # An argument that was replaced is marked itself, and not what reads it.
    before, after = ({n.name: called(n) for n in entry.graph.nodes} for entry in (stage.before, stage.after))
    gone = {node for node, call in before.items() if after.get(node) != call}
    new = {node for node, call in after.items() if before.get(node) != call}
    head = f"<h2>{escape(stage.title)}</h2>{_refusals(stage.refused)}"
    if not gone and not new:
        return f"<section>{head}<p>the graph stays as it was</p></section>"
    left = _side("before", stage.before, dict.fromkeys(gone, "gone"), stage.refused)
    right = _side("after", stage.after, dict.fromkeys(new, "new"), {})
    return f"<section>{head}<div class=sides>{left}{right}</div></section>"


def _refusals(refused: dict[str, str]) -> str:
    if not refused:
        return ""
    items = "".join(f"<li><b>{escape(node)}</b>: {escape(why)}</li>" for node, why in refused.items())
    return f"<details><summary>why nodes were refused</summary><ul>{items}</ul></details>"


def _side(title: str, entry: Entry, marks: dict[str, str], refused: dict[str, str]) -> str:
    nodes = list(entry.graph.nodes)
    calls = sum(node.op == "call_function" for node in nodes)
    marks = dict.fromkeys(refused, "refused") | marks
    lines = "".join(_grouped(nodes, 0, marks, refused))
    return f"<div><h3>{title}: {calls} calls</h3>{lines}</div>"


def _grouped(
    nodes: Sequence[fx.Node], depth: int, marks: dict[str, str], why: dict[str, str]
) -> Iterator[str]:
    """Yield lines, those of neighbours in one module in a group that folds."""
    for module, group in groupby(nodes, lambda node: tuple(_path(node)[: depth + 1])):
        members = list(group)
        if len(module) <= depth:
            yield from (_line(node, marks.get(node.name, ""), why.get(node.name, "")) for node in members)
            continue
        touched = " open" if any(node.name in marks for node in members) else ""
        kind = f" <small>{len(members)} nodes</small>"
        yield f"<details{touched}><summary>{escape(module[-1])}{kind}</summary>"
        yield from _grouped(members, depth + 1, marks, why)
        yield "</details>"


def _path(node: fx.Node) -> list[str]:
    """Return the modules that a node lies in; a weight lies where it is first read."""
    if node.op == "get_attr" and node.users:
        node = next(iter(node.users))
    return [part for part in module_of(node).split(".") if part]


def _line(node: fx.Node, mark: str, why: str) -> str:
    given = (f' class="{mark}"' if mark else "") + (f' title="{escape(why)}"' if why else "")
    return f"<code{given}>{escape(formatted(node))}</code>"

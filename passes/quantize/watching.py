"""Runs of a model on calibration data in which what its nodes compute is looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from specqd.passes.contract import Progress
from specqd.program import Entry, Program
from specqd.reference import Interpreter

__all__ = ["watched"]


def watched(
    program: Program,
    entry: Entry,
    batches: Collection[tuple[Any, ...]],
    what: str,
    nodes: Container[fx.Node],
    see: Callable[[fx.Node, Any, Mapping[fx.Node, Any]], None],
) -> Iterator[Progress]:
    """Run an entry on batches, and call `see(node, value, read)` behind nodes; `read` has the values that they read."""

    class Watcher(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in nodes:
                see(n, value, self.env)
            return value

    for number, batch in enumerate(batches):
        yield Progress(what, number, len(batches))
        with torch.no_grad():
            Watcher(program, entry).run(*batch)

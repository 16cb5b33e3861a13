"""Which graphs torch.compile makes of a module, and what of them codegen cannot compile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from specqd.errors import CodegenError
from specqd.program import Program

__all__ = ["Graph", "GraphsExplanation", "explain_graphs"]


@dataclass(frozen=True)
class Graph:
    """One graph: how often it calls each operator, and why it cannot be compiled, operator by operator."""

    operators: Counter[str]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class GraphsExplanation:
    """The graphs of a module in the order in which they were found, and why Dynamo parted them."""

    graphs: tuple[Graph, ...]
    breaks: tuple[str, ...]

    def __str__(self) -> str:
        """List what is refused of each graph, then the breaks."""
        lines = []
        for at, graph in enumerate(self.graphs):
            state = "runs in eager torch" if graph.refused else "is compiled"
            lines.append(f"graph {at}: {graph.operators.total()} operators, {state}")
            lines += [f"  refused: {why}" for why in graph.refused]
            lines += [f"  {count:5} x {name}" for name, count in graph.operators.most_common()]
        lines += [f"break: {why}" for why in self.breaks]
        return "\n".join(lines or ["no graph: the module computes no tensor"])


def explain_graphs(module: Callable[..., Any], *inputs: Any) -> GraphsExplanation:
    """Run a module once in eager torch, and tell what the backend would have compiled of it.

    Raises what the module itself raises.
    """
    from torch._dynamo.utils import counters

    from specqd.frontends.dynamo import Options, compiled

    found: list[Graph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compiled(gm, example_inputs, Options(fallback="error"), partial(_examined, found))

    before = Counter(counters["graph_break"])
    with torch.no_grad():
        torch.compile(module, backend=backend)(*inputs)
    breaks = Counter(counters["graph_break"]) - before
    return GraphsExplanation(tuple(found), tuple(why.splitlines()[0] for why in breaks))


def _examined(found: list[Graph], program: Program, _: Any) -> Callable[..., Any]:
    from specqd.codegen.general.lower import lower
    from specqd.codegen.isa import ISA

    calls = [node for node in program.target.graph.nodes if node.op == "call_function"]
    names = Counter(str(getattr(node.target, "overloadpacket", node.target)) for node in calls)
    try:
        lower(program, program.target, ISA())
    except CodegenError as error:
        found.append(Graph(names, error.reasons))
    else:
        found.append(Graph(names, ()))
    return program.module()

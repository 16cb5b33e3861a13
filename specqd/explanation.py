"""explain: for every node, what each pass of a pipeline did with it, or why it refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from specqd.errors import InputError
from specqd.passes import Applied, Pipeline
from specqd.program import Entry, Program, module_of

if TYPE_CHECKING:
    from specqd.graphs import GraphsExplanation

__all__ = ["Explanation", "NodeStory", "explain"]

_NUMBER = re.compile(r"_\d+\b")  # of a node: mul_12
_LAYER = re.compile(r"\.\d+\b(?=\.|\s)")  # in a module's path: layers.3.mlp


@dataclass
class NodeStory:
    """What happened to one node.

    Attributes:
        entry: the entry it belongs to.
        node: its name in the entry's graph.
        operator: what it calls, such as `aten.mul`.
        module: the module of the model that it comes from.
        notes: a step's text and what that step did or why it refused, in order.
        copied_from: the entry that it was copied from, with its story so far, when its own entry was derived.
    """

    entry: str
    node: str
    operator: str
    module: str
    notes: list[tuple[str, str]] = field(default_factory=list)
    copied_from: str | None = None

    def __str__(self) -> str:
        """Give the story on one line."""
        notes = "; ".join(f"{step}: {what}" for step, what in self.notes) or "untouched"
        return f"{self.node} = {self.operator} in {self.module or 'the model'} -- {notes}"


@dataclass(frozen=True)
class Explanation:
    """What a pipeline did: stories of all nodes there ever were, a line for each step, and the program.

    Printed, nodes with the same story in different layers share a line.
    """

    pipeline: Pipeline
    program: Program
    steps: tuple[str, ...]
    stories: tuple[NodeStory, ...]

    def of(self, entry: str, node: str) -> list[NodeStory]:
        """Return the stories of the nodes that had this name, oldest first."""
        return [s for s in self.stories if (s.entry, s.node) == (entry, node)]

    def __str__(self) -> str:
        """List the steps, then the stories of each entry."""
        lines = ["steps", *(f"  {step}" for step in self.steps)]
        for entry in dict.fromkeys(story.entry for story in self.stories):
            stories = [s for s in self.stories if s.entry == entry]
            lines += ["", f"{entry}: nodes that a pass made, took or refused", *_grouped(stories)]
            rest = Counter(s.operator for s in stories if not s.notes)
            copied = next((f" (copied from {s.copied_from})" for s in stories if s.copied_from), "")
            lines += ["", f"{entry}: nodes that no pass touched{copied}"]
            lines += [f"  {count:5} x {operator}" for operator, count in rest.most_common()]
        return "\n".join([*lines, "", str(self.program)])


def explain(source: Any, *given: Any) -> Explanation | GraphsExplanation:
    """Say what is done with a model, and what is not, and why.

    1. `explain(program, pipeline)`, or what specqd.capture takes alone in its place: run the pipeline and tell
       every node's story.
    2. `explain(module, *inputs)`: tell which graphs `torch.compile(module, backend="specqd")` makes of it, and what in
       them cannot be compiled; see specqd.graphs.

    Raises what capturing, the passes and the module itself raise.
    """
    if isinstance(source, nn.Module) or (callable(source) and not isinstance(source, Program)):
        from specqd.graphs import explain_graphs

        return explain_graphs(source, *given)
    if len(given) != 1:
        raise InputError("explain takes a program or a path, and a pipeline; or a module, and its inputs")
    (pipeline,) = given
    if not isinstance(source, Program):
        from specqd.frontends.dispatch import capture

        source = capture(source)
    record = _Record(source)
    steps = Pipeline.of(pipeline)
    return Explanation(steps, steps(source, record), tuple(record.steps), tuple(record.stories))


class _Record:
    """A watcher that keeps a story for every node; `living` finds it by entry and name, which are reused."""

    def __init__(self, program: Program) -> None:
        self.steps: list[str] = []
        self.stories: list[NodeStory] = []
        self.living: dict[tuple[str, str], NodeStory] = {}
        for entry in program.entries.values():
            self._tell(entry, _calls(entry), None)

    def __call__(self, applied: Applied) -> None:
        result, step = applied.result, str(applied.step)
        before, after = applied.before.entries[result.entry], result.program.entries[result.entry]
        self.steps.append(
            f"{step} on {result.entry}: {result.rewrites} rewrites, {len(result.refusals)} refusals, "
            f"{sum(1 for _ in _calls(before))} -> {sum(1 for _ in _calls(after))} nodes"
            + "".join(f"; {note.what}" for note in result.notes if not note.node)
        )
        kept = {node.name for node in after.graph.nodes}
        self._tell(after, (n for n in _calls(after) if (after.name, n.name) not in self.living), step)
        for refusal in result.refusals:  # also of a node that the step made
            self._story(refusal.node, before, after).notes.append((step, f"refused: {refusal.why}"))
        for note in result.notes:
            if note.node:
                self._story(note.node, after).notes.append((step, note.what))
        for old, new in _taken(before, after):
            self.living.pop((before.name, old.name)).notes.append((step, f"taken into {new}"))
        for node in _calls(before):
            if node.name not in kept and (before.name, node.name) in self.living:
                self.living.pop((before.name, node.name)).notes.append((step, "no longer needed"))
        for name in result.program.entries.keys() - applied.before.entries.keys():
            copy = result.program.entries[name]
            self._tell(copy, _calls(copy), None, copy.derived_from)

    def _story(self, name: str, *states: Entry) -> NodeStory:
        """Return the story of a node of an entry in one of its states."""
        entry = states[0]
        if (entry.name, name) not in self.living:
            node = next(n for state in states for n in state.graph.nodes if n.name == name)
            self._tell(entry, [node], None)
        return self.living[entry.name, name]

    def _tell(
        self, entry: Entry, nodes: Iterable[fx.Node], made_by: str | None, origin: str | None = None
    ) -> None:
        for node in nodes:
            notes = [(made_by, "made")] if made_by else []
            operator = str(node.target).rpartition(".")[0] if node.op == "call_function" else node.op
            story = NodeStory(entry.name, node.name, operator, module_of(node), notes, origin)
            self.stories.append(story)
            self.living[entry.name, node.name] = story


def _calls(entry: Entry) -> Iterator[fx.Node]:
    return (node for node in entry.graph.nodes if node.op == "call_function")


def _taken(before: Entry, after: Entry) -> Iterator[tuple[fx.Node, str]]:
    """Pair each node that a rewrite took in with the rewrite: what it replaced, and what only that used."""
    kept = {node.name for node in after.graph.nodes}
    nodes = {node.name: node for node in before.graph.nodes if node.op == "call_function"}
    seen: set[fx.Node] = set()
    for new in (n for n in after.graph.nodes if n.name not in nodes):
        pending = [nodes[old] for old in (new.meta.get("replaces"),) if old in nodes]
        while pending:
            node = pending.pop()
            if node in seen or node.name in kept or node.op != "call_function":
                continue
            seen.add(node)
            yield node, new.name
            pending += node.all_input_nodes


def _grouped(stories: list[NodeStory]) -> Iterator[str]:
    """Print stories once for all layers: numbers in names do not tell two of them apart."""
    groups: dict[str, list[NodeStory]] = {}
    for story in stories:
        if story.notes:
            text = _LAYER.sub(".*", _NUMBER.sub("", str(story).partition(" = ")[2]))
            groups.setdefault(text, []).append(story)
    return (f"  {len(group):5} x {text} (first: {group[0].node})" for text, group in groups.items())

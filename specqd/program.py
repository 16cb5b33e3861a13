"""Program: the one value that flows through specqd, from capture through passes to codegen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from specqd.cache_formats import FORMATS, KEY_FORMATS
from specqd.errors import InputError
from specqd.manifest import Selection

__all__ = ["TOKENS", "Entry", "Event", "Input", "KVCache", "ModelInfo", "Program", "State", "module_of"]


@dataclass(frozen=True)
class KVCache:
    """Declared state: keys and values of the attention layers that share one shape.

    Held as two tensors, `[layers, kv_heads, capacity, key_dim]` and `[..., value_dim]`, that graphs take as
    placeholders `<name>_k` and `<name>_v`. Slot `p` belongs to position `p`. `key_dtype` and `value_dtype` are names
    of specqd.cache_formats; see `reference.new_caches` on the tensors of quantised ones. They are rounded when they are
    written, or with `recent` by whole blocks: a position is read rounded where its block lies more than `recent`
    positions before the block of whoever reads it, and in BF16 where not. With `rotated`, values lie rotated.
    """

    name: str
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    capacity: int
    key_dtype: str = "bfloat16"
    value_dtype: str = "bfloat16"
    recent: int | None = None
    rotated: bool = False

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The names under which graphs take it."""
        return f"{self.name}_k", f"{self.name}_v"

    @property
    def planes(self) -> int:
        """Key heads of all layers."""
        return self.layers * self.kv_heads

    @property
    def whole_blocks(self) -> bool:
        """Whether a block is rounded when all its positions are there."""
        return self.recent is not None

    @property
    def dtype(self) -> str:
        """The format in words: `bfloat16`, or `int8 keys, bfloat16 values` where they differ."""
        if self.key_dtype == self.value_dtype:
            return self.key_dtype
        return f"{self.key_dtype} keys, {self.value_dtype} values"

    @property
    def bytes(self) -> int:
        """Memory of the whole cache in bytes, that of recent blocks aside."""
        keys = KEY_FORMATS[self.key_dtype].vector_bytes(self.key_dim)
        values = FORMATS[self.value_dtype].vector_bytes(self.value_dim)
        return self.layers * self.kv_heads * self.capacity * (keys + values)


@dataclass(frozen=True)
class Input:
    """What a placeholder takes: a dtype, and a shape of which the sizes of the dimensions `dynamic` are examples."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    dynamic: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Give it as `x float32 [?, 3, 224, 224]`."""
        sizes = ("?" if at in self.dynamic else str(size) for at, size in enumerate(self.shape))
        return f"{self.name} {self.dtype} [{', '.join(sizes)}]"


@dataclass(frozen=True)
class State(Input):
    """Declared state of a module: what a call leaves for the next one, zeros before the first.

    A graph takes it as the placeholder of its name and gives its next value behind the module's own outputs, those of
    several in the order of their placeholders. Its shape is fixed.
    """

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The names under which graphs take it."""
        return (self.name,)


TOKENS = (Input("tokens", "int64", (1, 7), (1,)), Input("positions", "int64", (1, 7), (1,)))
"""What an entry of a language model takes, besides its caches."""


@dataclass
class Entry:
    """One function of a program: a graph from `inputs`, by default `tokens` and `positions`, to its outputs.

    The graph holds `aten.*` and `specqd::*` calls; weights are `get_attr` nodes named as in `Program.weights`.
    That of a language model computes float32 logits in float32, and its placeholders beyond `inputs` are caches. That
    of any other module computes in the module's own dtypes and may have several outputs, then in a tuple; what it takes
    beyond `inputs` are states.
    `vocab_size` and `max_positions` are set where they are not the target's.
    """

    name: str
    graph: fx.Graph
    derived_from: str | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    inputs: tuple[Input, ...] = TOKENS

    @property
    def of_language_model(self) -> bool:
        """Whether it takes tokens and their positions, and gives logits."""
        return self.inputs == TOKENS

    def copy(self) -> Entry:
        """Return an entry with its own graph, sharing nothing that a pass may change."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return replace(self, graph=graph)


@dataclass(frozen=True)
class Event:
    """What one pass did to one entry: its text, the rewrites, `(node, reason)` refusals, `(node, what)` notes.

    A note about the whole entry has no node, `""`.
    """

    step: str
    entry: str
    rewritten: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    noted: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """Facts about the captured model that outlive the graph; without a vocabulary it is no language model."""

    family: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    source: str = ""
    tokenizer_files: tuple[str, ...] = ()


@dataclass
class Program:
    """Named entries over one weight store, their caches and states, and in which order they speculate (target first).

    `dense` holds what weights were before they were pruned, by name: the teacher of a calibration.
    """

    entries: dict[str, Entry]
    weights: dict[str, torch.Tensor]
    model: ModelInfo
    caches: dict[str, KVCache] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    history: list[Event] = field(default_factory=list)
    selection: Selection | None = None
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Default the chain to the only entry."""
        if not self.chain:
            self.chain = tuple(self.entries)[:1]

    @property
    def target(self) -> Entry:
        """The entry whose output every other one must reproduce."""
        return self.entries[self.chain[0]]

    def copy(self) -> Program:
        """Return a program whose graphs may be rewritten freely; weight tensors are shared."""
        return Program(
            {name: entry.copy() for name, entry in self.entries.items()},
            dict(self.weights),
            self.model,
            dict(self.caches),
            self.chain,
            list(self.history),
            self.selection,
            dict(self.dense),
            dict(self.states),
        )

    def module(self, entry: str | None = None) -> torch.nn.Module:
        """Return an ordinary module that computes an entry (default: the target) in eager torch.

        See specqd.reference.module; raises InputError as `entry` does.
        """
        from specqd.reference import module

        return module(self, self.target if entry is None else self.entry(entry))

    def entry(self, name: str) -> Entry:
        """Look an entry up by name; raises InputError listing the known ones."""
        if name not in self.entries:
            raise InputError(f"the program has no entry {name!r}; it has {', '.join(sorted(self.entries))}")
        return self.entries[name]

    def takes(self, entry: Entry) -> tuple[Input, ...]:
        """Return what the placeholders of a module's entry take, in their order: its inputs, then states."""
        others = entry.graph.find_nodes(op="placeholder")[len(entry.inputs) :]
        return (*entry.inputs, *(self.states[str(node.target)] for node in others))

    @property
    def planes(self) -> int:
        """Planes of all caches: a layer's key head each."""
        return sum(cache.planes for cache in self.caches.values())

    def first_plane(self, name: str) -> int:
        """Return how many planes the caches before this one have."""
        names = list(self.caches)
        return sum(self.caches[before].planes for before in names[: names.index(name)])

    def used_weights(self, *names: str) -> list[str]:
        """Names of the weights that the given entries (default: all) read, in order of first use."""
        graphs = [self.entries[n].graph for n in (names or self.entries)]
        used: dict[str, Any] = {str(n.target): None for g in graphs for n in g.nodes if n.op == "get_attr"}
        return list(used)

    def drop_unused_weights(self) -> None:
        """Forget weights that no entry reads any more."""
        self.weights = {name: self.weights[name] for name in self.used_weights()}
        self.dense = {name: weight for name, weight in self.dense.items() if name in self.weights}

    def __str__(self) -> str:
        """Describe entries, caches and weight bytes, a line each."""
        total = sum(t.numel() * t.element_size() for t in self.weights.values())
        lines = [f"{self.model.family} program: {total / 1e6:.1f} MB in {len(self.weights)} weights"]
        for name, entry in self.entries.items():
            count = sum(n.op == "call_function" for n in entry.graph.nodes)
            origin = f", derived from {entry.derived_from}" if entry.derived_from else ""
            takes = "" if entry.of_language_model else f", takes {', '.join(map(str, entry.inputs))}"
            lines.append(f"  {name}: {count} nodes, {len(self.used_weights(name))} weights{takes}{origin}")
            lines += [
                f"  {name}: {what} ({event.step})"
                for event in self.history
                for node, what in event.noted
                if event.entry == name and not node
            ]
        lines += [
            f"  cache {c.name}: {c.layers} layers x {c.kv_heads} heads x {c.capacity} x "
            f"{c.key_dim}+{c.value_dim} {c.dtype}, {c.bytes / 1e6:.1f} MB"
            for c in self.caches.values()
        ]
        lines += [f"  state {state}" for state in self.states.values()]
        lines.append(f"  chain: {' <- '.join(self.chain)}")
        return "\n".join(lines)


def module_of(node: fx.Node) -> str:
    """Return the path of the model's module that a node comes from; empty if that is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).removeprefix("model.") if stack else ""  # capture wraps the model as `model`
    return "" if path.startswith("_") else path  # torch.export's own marks

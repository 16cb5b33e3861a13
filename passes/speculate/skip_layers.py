"""skip-layers: a draft without some of its layers."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from itertools import groupby

import torch
from torch import fx

from specqd.errors import InputError
from specqd.passes.contract import Pass, Progress, Refusal
from specqd.passes.match import calls, shapes
from specqd.passes.quantize.calibration_text import read_file
from specqd.passes.quantize.own_text import write
from specqd.program import Entry, Program

from .layer_search import search
from .residual import Block, residual_blocks

__all__ = ["SkipLayers"]

aten = torch.ops.aten
_STATELESS = torch.ops.specqd.causal_attention
_LEAST_TOKENS = 128


class SkipLayers(Pass):
    """Leave layers of a draft out, those that are named or those that a search finds.

        x1 = layer(x0), x2 = layer(x1), x3 = layer(x2)  ->  x1 = layer(x0), x3 = layer(x1)

    Layers are numbered from 0 as the graph has them (see specqd.passes.speculate.residual). Those that stay keep their
    places in the cache, so that a draft which shares the target's still reads the keys and values of the same layers.

    1. `layers` names what is left out.
    2. Without it, a search leaves out, one after the other, the layer that costs least in predicted speed-up, as long
       as that grows (see specqd.passes.speculate.layer_search). It compares the draft's choices with the target's on a
       text, so put it after the casts and share-kv, which decide on both its choices and its cost.
    3. Refused: the target, an entry that this pass has shortened before (the numbers would mean other layers), layers
       that the graph has not or that change the width, and all layers at once. A search that finds nothing is
       refused with its figures.

    Attributes:
        layers: numbers of layers to leave out, such as `3|7|12-14`; none: search.
        gain: what a search must gain at least in predicted speed-up, as a share.
        text: a UTF-8 file to search on; without one the target writes a text, see specqd.passes.quantize.own_text.
        tokens: how many tokens to search on, half of them to confirm what is found.
        seed: chooses the text, where the model writes it.
    """

    name = "skip-layers"
    for_language_models = True
    layers: tuple[str, ...] = ()
    gain: float = 0.01
    text: str = ""
    tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        self._named()
        if self.tokens < _LEAST_TOKENS:
            raise InputError(
                f"{self.name}: {self.tokens} tokens are too few to search on; give {_LEAST_TOKENS} or more"
            )
        if not 0 <= self.gain < float("inf"):
            raise InputError(f"{self.name}: a gain of {self.gain} cannot be asked for; give 0 or more")

    @property
    def lossless(self) -> bool:
        """Layers are left out."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Progress]:
        """Lead the users of what a layer leaves to what it was given, or say why not."""
        output = next(n for n in reversed(entry.graph.nodes) if n.op == "output")
        blocks = residual_blocks(entry)
        reason = self._unsuitable(program, entry, blocks.layers)
        chosen = self._named()
        if reason is None and not self.layers:
            texts = yield from self._texts(program)
            found = yield from search(program, entry, texts, self.gain)
            chosen, reason = found.layers, None if found.layers else found.figures
            yield Progress(found.figures, 1, 1)
        if reason:
            yield Refusal(output.name, reason)
            return
        for _, run in groupby(enumerate(chosen), lambda one: one[1] - one[0]):
            skipped = [blocks.layers[layer] for _, layer in run]
            _leave_out(entry, skipped)
            yield from (skipped[0].start for _ in skipped)

    def _texts(self, program: Program) -> Generator[Progress, None, list[list[int]]]:
        if self.text:
            return read_file(self.text, program.model, self.tokens)
        return (yield from write(program, self.tokens, self.seed))

    def _named(self) -> list[int]:
        """The numbers in `layers`, ascending."""
        named: set[int] = set()
        for text in self.layers:
            found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
            if last < first:
                raise InputError(
                    f"{self.name}: {text!r} names no layers; write numbers or ranges from 0 on, such as 3|7|12-14"
                )
            named |= set(range(first, last + 1))
        return sorted(named)

    def _unsuitable(self, program: Program, entry: Entry, layers: tuple[Block, ...]) -> str | None:
        if entry.name == program.chain[0]:
            return "this is the target, whose output must stay what it is"
        if any(_shortened(event.step, event.entry, entry) and event.rewritten for event in program.history):
            return f"{entry.name} lacks layers already; name all that are to go in one step"
        if not self.layers and any(calls(node, _STATELESS) for node in entry.graph.nodes):
            return "a search needs a cache, as drafting does; put insert-kv-cache first"
        if not layers:
            return "no layers are found: not one value alone flows from each attention to the next"
        known = shapes(program, entry)
        other = next((i for i, one in enumerate(layers) if known[one.start] != known[one.end]), None)
        if other is not None:
            return f"layer {other} takes {tuple(known[layers[other].start])} and leaves another shape"
        chosen = self._named()
        beyond = next((layer for layer in chosen if layer >= len(layers)), None)
        if beyond is not None:
            return f"there is no layer {beyond} that can go; there are 0 to {len(layers) - 1}"
        return "all layers would go; leave one" if len(chosen) == len(layers) else None


def _shortened(step: str, name: str, entry: Entry) -> bool:
    return step.partition("{")[0] == SkipLayers.name and name == entry.name


def _leave_out(entry: Entry, skipped: list[Block]) -> None:
    """Take layers that follow each other out of the graph."""
    graph = entry.graph
    tokens = next(n for n in graph.find_nodes(op="placeholder") if n.target == "tokens")
    inside = {node for block in skipped for node in block.nodes}
    for size in [n for n in graph.nodes if calls(n, aten.sym_size) and n.args[0] in inside]:
        # The number of rows, for nothing else is open.
        size.args = (tokens, 1)
    skipped[-1].end.replace_all_uses_with(skipped[0].start)
    for block in reversed(skipped):
        for node in reversed(block.nodes):
            # Attention writes into the cache, so it would not count as dead.
            graph.erase_node(node)

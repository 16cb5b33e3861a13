"""Programs of a few nodes for tests of passes: an ordinary module becomes the target of a Program."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from specqd.frontends.normalise import normalise
from specqd.program import Entry, ModelInfo, Program

__all__ = ["DIM", "LENGTH", "VOCAB", "Decoder", "logits", "names", "of", "ops"]

VOCAB, DIM, LENGTH = 13, 64, 9


class Decoder(nn.Module):
    """Embeds tokens `[1, S]` to `[1, S, DIM]`, applies `body(self, x, positions)`, and projects to logits."""

    def __init__(
        self, body: Callable[[nn.Module, Tensor, Tensor], Tensor], **members: nn.Module | Tensor
    ) -> None:
        super().__init__()
        self.body = body
        self.embed = nn.Embedding(VOCAB, DIM)
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.lm_head(self.body(self, self.embed(tokens), positions))


def of(model: nn.Module, max_positions: int = 64) -> Program:
    """Capture a module over tokens and positions int64 `[1, S]`, with its weights as they are."""
    example = torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None]
    length = Dim("length", min=1, max=max_positions)
    exported = export(model, example, dynamic_shapes=({1: length}, {1: length}))
    weights = {s.arg.name: s.target for s in exported.graph_signature.input_specs if s.target}
    graph = normalise(exported.graph_module, weights, {})
    stored = {name: t.detach() for name, t in exported.state_dict.items() if name in weights.values()}
    return Program({"target": Entry("target", graph)}, stored, ModelInfo("toy", VOCAB, max_positions))


def ops(program: Program, entry: str = "target") -> list[str]:
    """The operators of an entry, in order, without shapes' bookkeeping."""
    called = [n.target for n in program.entries[entry].graph.nodes if n.op == "call_function"]
    names = [str(getattr(t, "overloadpacket", t)) for t in called]
    return [name for name in names if "sym_size" not in name]


def names(program: Program, entry: str = "target") -> list[str]:
    """The inputs of an entry."""
    return [str(n.target) for n in program.entries[entry].graph.nodes if n.op == "placeholder"]


def logits(program: Program, entry: str = "target") -> Tensor:
    """The reference's logits for LENGTH tokens at positions 0, 1, ..."""
    from specqd.reference import run

    return run(program, program.entries[entry], torch.arange(LENGTH)[None] % VOCAB)

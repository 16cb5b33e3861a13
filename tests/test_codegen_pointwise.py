"""Elementwise operators, compiled in one function, against eager torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import RUNNABLE, Compiled
from small_programs import VOCAB, of
from torch import Tensor, fx, nn
from torch.testing import assert_close
from transformers.activations import ACT2CLS, ACT2FN

from specqd.codegen.lower.pointwise import ELEMENTWISE
from specqd.program import Entry, ModelInfo, Program
from specqd.reference import run

aten = torch.ops.aten
WIDTH, ROWS = 48, 5

#: operators of one tensor: arguments after it, and the least and the largest number they are tried on
ONE: list[tuple[Any, tuple[Any, ...], float, float]] = [
    (aten.neg.default, (), -9, 9),
    (aten.abs.default, (), -9, 9),
    (aten.reciprocal.default, (), 0.1, 9),
    (aten.sqrt.default, (), 0, 9),
    (aten.rsqrt.default, (), 0.1, 9),
    (aten.square.default, (), -9, 9),
    *((aten.pow.Tensor_Scalar, (exponent,), 0.1, 9) for exponent in (1, 2, 3, 0.5, -0.5, -1.5)),
    (aten.exp.default, (), -9, 9),
    (aten.expm1.default, (), -2, 2),
    (aten.log.default, (), 0.01, 9),
    (aten.log1p.default, (), -0.9, 9),
    (aten.floor.default, (), -9, 9),
    (aten.tanh.default, (), -4, 4),
    (aten.sigmoid.default, (), -9, 9),
    (aten.silu.default, (), -9, 9),
    (aten.gelu.default, (), -4, 4),
    (aten.erf.default, (), -4, 4),
    (aten.relu.default, (), -9, 9),
    (aten.leaky_relu.default, (), -9, 9),
    (aten.leaky_relu.default, (0.3,), -9, 9),
    (aten.hardtanh.default, (), -9, 9),
    (aten.hardtanh.default, (-2.0, 3.0), -9, 9),
    (aten.hardswish.default, (), -5, 5),
    (aten.softplus.default, (), -30, 30),
    (aten.softplus.default, (2.0, 5.0), -9, 9),
    (aten.mish.default, (), -30, 30),
    (aten.cos.default, (), -9, 9),
    (aten.sin.default, (), -9, 9),
    (aten.clamp.default, (-2.0, 3.0), -9, 9),
    (aten.clamp.default, (None, 1.5), -9, 9),
    (aten.clip.default, (-2.0, 3.0), -9, 9),
    (aten.clamp_min.default, (0.5,), -9, 9),
    (aten.rsub.Scalar, (2.5,), -9, 9),
    (aten.clone.default, (), -9, 9),
    (aten.contiguous.default, (), -9, 9),
]
TWO = [
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default,
    aten.max.other, aten.min.other,
]  # fmt: skip
COMPARISONS = [aten.gt, aten.lt, aten.ge, aten.le]
ELSEWHERE = {aten.where.self, aten.prelu.default}


def every_operator(rng: torch.Generator) -> Program:
    """Each case on channels of its own of two looked-up rows, all side by side as if they were logits."""
    count = len(ONE) + len(TWO) + 3 * len(COMPARISONS) + 1
    x, y = (torch.randint(-4, 5, (ROWS, count * WIDTH), generator=rng).float() for _ in range(2))
    x[:, ::2] += torch.rand(x[:, ::2].shape, generator=rng)
    for i, (_, _, low, high) in enumerate(ONE):
        part = x[:, i * WIDTH : (i + 1) * WIDTH]
        part.uniform_(low, high, generator=rng)
    graph = fx.Graph()
    tokens, positions = graph.placeholder("tokens"), graph.placeholder("positions")

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call_function(op, args)

    rows = [call(aten.embedding.default, graph.create_node("get_attr", name), tokens) for name in "xy"]
    places = call(aten.unsqueeze.default, positions, -1)
    slope = graph.create_node("get_attr", "slope")

    def case(i: int) -> fx.Node:
        a, b = (call(aten.slice.Tensor, row, 2, i * WIDTH, (i + 1) * WIDTH) for row in rows)
        if i < len(ONE):
            return call(ONE[i][0], a, *ONE[i][1])
        if (i := i - len(ONE)) < len(TWO):
            return call(TWO[i], a, b)
        if (i := i - len(TWO)) == 3 * len(COMPARISONS):
            return call(aten.prelu.default, a, slope)
        packet, kind = COMPARISONS[i // 3], i % 3
        operands = [(packet.Tensor, a, b), (packet.Scalar, a, 1.0), (packet.Scalar, places, 2)][kind]
        return call(aten.where.self, call(*operands), a, b)

    graph.output(call(aten.cat.default, [case(i) for i in range(count)], -1))
    weights = {"x": x, "y": y, "slope": torch.tensor([0.2])}
    return Program({"target": Entry("target", graph)}, weights, ModelInfo("toy", ROWS, ROWS))


@pytest.mark.parametrize("isa", RUNNABLE)
def test_operators_are_those_of_torch(isa: str, rng: torch.Generator) -> None:
    """Within 4e-6: erf is right to 5e-7, which GELU multiplies by its input."""
    program = every_operator(rng)
    tokens = list(range(ROWS))
    wanted = run(program, program.target, torch.tensor([tokens]))[0]
    got = torch.from_numpy(Compiled(program, isa).feed("target", tokens, 0))
    assert_close(got, wanted, rtol=4e-6, atol=4e-6)


def test_every_operator_is_tried() -> None:
    compared = {getattr(packet, kind) for packet in COMPARISONS for kind in ("Tensor", "Scalar")}
    assert {op for op, *_ in ONE} | {*TWO} | compared | ELSEWHERE == set(ELEMENTWISE)


class Activations(nn.Module):
    """Every activation that a configuration can name, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.functions = nn.ModuleList(ACT2FN[name] for name in ACT2CLS)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens)
        return torch.cat([function(x) for function in self.functions], -1) + positions[..., None] * 0.0


def test_every_activation_that_a_configuration_can_name() -> None:
    """Within 4e-6, as the operators."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Activations().float().eval()
        nn.init.normal_(model.embed.weight, std=3.0)
    program = of(model)
    tokens = list(range(VOCAB))
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]), torch.arange(VOCAB)[None])[0]
    got = torch.from_numpy(Compiled(program).feed("target", tokens, 0))
    assert_close(got, wanted, rtol=4e-6, atol=4e-6)

"""cast-int8: every matrix of an entry in INT8, in the graph, in numbers, and compiled."""

from __future__ import annotations

import pytest
import torch
from compiled import RUNNABLE, Compiled, llama, random_tokens
from small_programs import DIM, Decoder, of, ops
from torch import nn

from specqd.passes import Pipeline
from specqd.passes.quantize.cast_int8 import CastINT8
from specqd.passes.quantize.cast_mxfp4 import CastMXFP4
from specqd.program import Program
from specqd.reference import run


def decoder() -> Program:
    """Rows of 64 and of 50, one with a bias."""
    made = Decoder(
        lambda m, x, _: m.up(torch.relu(m.down(x))),
        down=nn.Linear(DIM, 50),
        up=nn.Linear(50, DIM, bias=False),
    )
    return of(made)  # fmt: skip


def test_every_linear_is_cast():
    result = CastINT8()(decoder())
    assert ops(result.program) == [
        "aten.embedding",
        *["specqd.linear_int8", "aten.relu"],
        *["specqd.linear_int8"] * 2,
    ]
    assert (result.rewrites, result.refusals) == (3, ())
    assert result.program.weights["up.weight.int8_values"].shape == (DIM, 50)


def test_weights_are_off_by_half_a_step_at_most():
    before = decoder()
    after = CastINT8()(before).program
    for name in ("down", "up", "lm_head"):
        weight = before.weights[f"{name}.weight"]
        values, scales = (after.weights[f"{name}.weight.int8_{part}"] for part in ("values", "scales"))
        assert scales.shape == (len(weight),)
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((values * scales[:, None] - weight).abs() <= step * 0.501).all()


def test_what_is_kept_or_cast_is_refused():
    result = CastINT8(keep=("down.*",))(decoder())
    assert [r.why for r in result.refusals] == ["kept: down.weight matches down.*"]
    twice = CastINT8()(CastMXFP4()(decoder()).program)
    assert {r.why for r in twice.refusals} == {
        "cast already: specqd.linear_mxfp4.default",
        "cast already: specqd.linear_int8.default",
    }
    assert twice.rewrites == 1  # rows of 50, which MXFP4 cannot hold


def test_a_second_time_changes_nothing():
    once = CastINT8()(decoder()).program
    assert CastINT8()(once).rewrites == 0


@pytest.mark.parametrize("isa", RUNNABLE[:1])
def test_compiled_layers_are_the_references_but_for_rounded_activations(isa: str, rng):
    """Rounded activations move the logits by 5 % of their deviation; MXFP4 moves them five times as far as INT8."""
    steps = "derive-draft{entry=eight}, eight: cast-int8, eight: share-kv"
    made = Pipeline.parse(steps)(llama())
    tokens = random_tokens(made, 12, rng)
    target, four, eight = (
        run(made, made.entries[e], torch.tensor([tokens]))[0] for e in ("target", "draft", "eight")
    )
    got = torch.from_numpy(Compiled(made, isa).decode("eight", tokens, 4))

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).square().mean().sqrt() / target.std()).item()

    assert apart(got, eight) < 0.05
    assert apart(eight, target) < 0.2 * apart(four, target)

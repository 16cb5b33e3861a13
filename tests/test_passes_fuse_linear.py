import pytest
import torch
from small_programs import DIM, VOCAB, Decoder, logits, of, ops
from torch import nn
from torch.testing import assert_close

from specqd.passes.fuse_linear import FuseLinear
from specqd.passes.match import head, weight_of

# The products are the same; a matrix product of more rows may add up in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def qkv(m, x, _):
    return m.o(torch.cat((m.q(x), m.k(x), m.v(x)), -1))


def decoder(bias=(True, True, True)):
    sizes = (DIM, 16, 24)
    parts = {n: nn.Linear(DIM, s, bias=b) for n, s, b in zip("qkv", sizes, bias, strict=True)}
    return of(Decoder(qkv, **parts, o=nn.Linear(sum(sizes), DIM)))


@pytest.mark.parametrize("bias", [True, False])
def test_linears_of_one_value_become_one(bias):
    program = decoder((bias,) * 3)
    result = FuseLinear()(program)
    assert ops(program) == ["aten.embedding", *["aten.linear"] * 3, "aten.cat", "aten.linear", "aten.linear"]
    assert ops(result.program) == [
        "aten.embedding", "aten.linear", *["aten.slice"] * 3, "aten.cat", "aten.linear", "aten.linear",
    ]  # fmt: skip
    assert result.rewrites == 1 and not result.refusals
    assert_close(logits(result.program), logits(program), **TOLERANCE)


def test_weights_are_stacked_and_named_after_their_parts():
    program = decoder()
    after = FuseLinear()(program).program
    expected = torch.cat([program.weights[f"{n}.weight"] for n in "qkv"])
    assert torch.equal(after.weights["{q+k+v}.weight"], expected)
    assert torch.equal(
        after.weights["{q+k+v}.bias"], torch.cat([program.weights[f"{n}.bias"] for n in "qkv"])
    )
    assert "{q+k+v}.weight" in after.used_weights() and "q.weight" not in after.used_weights()


def test_a_bias_that_the_others_lack_keeps_a_linear_out():
    program = decoder((True, False, False))
    result = FuseLinear()(program)
    assert result.rewrites == 1
    assert "{k+v}.weight" in result.program.weights
    assert [r.why for r in result.refusals] == [
        "no other linear that reads embedding has a weight in torch.float32 and a bias in torch.float32"
    ]
    assert_close(logits(result.program), logits(program), **TOLERANCE)


def test_another_dtype_keeps_a_linear_out():
    program = decoder((False,) * 3)
    program.weights["q.weight"] = program.weights["q.weight"].bfloat16()
    result = FuseLinear()(program)
    assert "{k+v}.weight" in result.program.weights
    assert [r.why for r in result.refusals] == [
        "no other linear that reads embedding has a weight in torch.bfloat16 and no bias"
    ]


def test_a_weight_read_elsewhere_is_not_stored_twice():
    def body(m, x, _):
        return m.q(x) + m.k(x) + x @ m.q.weight

    program = of(Decoder(body, q=nn.Linear(DIM, DIM), k=nn.Linear(DIM, DIM)))
    result = FuseLinear()(program)
    assert result.rewrites == 0
    assert [r.why for r in result.refusals] == ["its weight q.weight is also read by matmul"]


def test_a_computed_weight_is_refused():
    def body(m, x, _):
        return torch.nn.functional.linear(x, m.q.weight * 2) + m.k(x) + m.q(x)

    program = of(Decoder(body, q=nn.Linear(DIM, DIM, bias=False), k=nn.Linear(DIM, DIM, bias=False)))
    reasons = [r.why for r in FuseLinear()(program).refusals]
    assert "its weight or bias is computed, not stored" in reasons


class Capped(Decoder):
    def forward(self, tokens, positions):
        return torch.tanh(self.lm_head(self.body(self, self.embed(tokens), positions)) / 5.0) * 5.0


class TwoHeads(Decoder):
    def forward(self, tokens, positions):
        x = self.body(self, self.embed(tokens), positions)
        return self.lm_head(x) + self.other(x)


def test_the_head_is_the_linear_behind_the_logits():
    program = of(
        Capped(qkv, q=nn.Linear(DIM, 8), k=nn.Linear(DIM, 8), v=nn.Linear(DIM, 8), o=nn.Linear(24, DIM))
    )
    assert weight_of(head(program.target.graph)) == "lm_head.weight"
    two = of(TwoHeads(lambda m, x, _: x, other=nn.Linear(DIM, VOCAB, bias=False)))
    assert head(two.target.graph) is None


def test_a_second_run_rewrites_nothing():
    once = FuseLinear()(decoder((True, False, False))).program
    again = FuseLinear()(once)
    assert again.rewrites == 0 and ops(again.program) == ops(once)

import pytest
import torch
from small_programs import DIM, Decoder, logits, of, ops
from torch.testing import assert_close

from specqd.passes.fuse_rms_norm import FuseRMSNorm

EPS = 1e-5


def scale(x):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


# A body for every order of factors that a family of transformers uses, and the weight and offset it gives.
NORMS = {
    "llama": (lambda m, x, _: m.w * (x * scale(x)), "w", 0.0),
    "x * s * weight": (lambda m, x, _: x * scale(x) * m.w, "w", 0.0),
    "s * x": (lambda m, x, _: scale(x) * x * m.w, "w", 0.0),
    "gemma": (lambda m, x, _: x * scale(x) * (1.0 + m.w), "w", 1.0),
    "another offset": (lambda m, x, _: (m.w + 0.5) * (x * scale(x)), "w", 0.5),
    "no weight": (lambda m, x, _: x * scale(x) + m.w, None, 0.0),
    "x * x": (lambda m, x, _: m.w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)), "w", 0.0),
    "eps first": (lambda m, x, _: m.w * (x * torch.rsqrt(EPS + (x * x).mean(2, keepdim=True))), "w", 0.0),
    "a weight a head": (lambda m, x, _: (x * scale(x)).view(1, -1, 4, DIM // 4).flatten(2) * m.w, None, 0.0),
    "of equal values": (lambda m, x, _: m.w * ((x - 1) * scale(x - 1)), "w", 0.0),
}


def decoder(body):
    model = Decoder(body, w=torch.linspace(-1, 1, DIM))
    return of(model)


@pytest.mark.parametrize(("body", "weight", "offset"), NORMS.values(), ids=NORMS)
def test_every_order_of_factors_becomes_one_operator_with_the_same_bits(body, weight, offset):
    program = decoder(body)
    result = FuseRMSNorm()(program)
    made = next(n for n in result.program.target.graph.nodes if "rms_norm" in n.name)
    assert (str(made.args[1]) if weight else made.args[1]) == weight
    assert made.args[2:] == (EPS, offset)
    assert result.rewrites == 1 and not result.refusals
    assert_close(logits(result.program), logits(program), rtol=0, atol=0)
    assert "aten.rsqrt" not in ops(result.program)


def test_the_norm_of_llama_before_and_after():
    program = decoder(NORMS["llama"][0])
    assert ops(program) == [
        "aten.embedding", "aten.pow", "aten.mean", "aten.add", "aten.rsqrt", "aten.mul", "aten.mul",
        "aten.linear",
    ]  # fmt: skip
    assert ops(FuseRMSNorm()(program).program) == ["aten.embedding", "specqd.rms_norm", "aten.linear"]


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_the_norm_of_aten_becomes_ours(eps):
    program = of(Decoder(lambda m, x, _: m.norm(x), norm=torch.nn.RMSNorm(DIM, eps=eps)))
    result = FuseRMSNorm()(program)
    assert ops(result.program) == ["aten.embedding", "specqd.rms_norm", "aten.linear"]
    assert_close(logits(result.program), logits(program), rtol=1e-6, atol=1e-6)


def sum_of_squares(x):
    return torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)


def twice(m, x, _):
    s = scale(x)
    return x * s + s


REFUSED = {
    "not a mean": (lambda m, x, _: x * sum_of_squares(x), "it is not taken of a mean plus a number"),
    "no eps": (
        lambda m, x, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
        "it is not taken of a mean plus a number",
    ),
    "not a square": (
        lambda m, x, _: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS),
        "the mean is of abs_1, which is not a square",
    ),
    "another dimension": (
        lambda m, x, _: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
        "mean is not over the last dimension alone, or does not keep it",
    ),
    "two dimensions": (
        lambda m, x, _: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS),
        "mean is not over the last dimension alone, or does not keep it",
    ),
    "used twice": (twice, "it is not used by one multiplication alone"),
    "another value scaled": (
        lambda m, x, _: (x + 1) * scale(x),
        "mul scales add, but the mean is over the square of embedding",
    ),
}


@pytest.mark.parametrize(("body", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_norm_is_left_alone_and_said_so(body, why):
    program = decoder(body)
    result = FuseRMSNorm()(program)
    assert result.rewrites == 0
    assert [r.why for r in result.refusals] == [why]
    assert ops(result.program) == ops(program)


def test_a_mean_that_others_read_is_refused():
    def body(m, x, _):
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + EPS) + mean

    assert [r.why for r in FuseRMSNorm()(decoder(body)).refusals] == ["mean is also used elsewhere"]


def test_a_norm_of_a_norm_becomes_two():
    norm = NORMS["s * x"][0]
    program = decoder(lambda m, x, _: norm(m, norm(m, x, _), _))
    result = FuseRMSNorm()(program)
    assert result.rewrites == 2 and not result.refusals
    assert_close(logits(result.program), logits(program), rtol=0, atol=0)


def test_a_second_run_rewrites_nothing():
    once = FuseRMSNorm()(decoder(NORMS["gemma"][0])).program
    again = FuseRMSNorm()(once)
    assert again.rewrites == 0 and ops(again.program) == ops(once)

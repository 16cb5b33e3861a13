import pytest
import torch
from small_modules import calls, of
from small_programs import DIM, Decoder, logits
from small_programs import of as decoder

from specqd.passes import Pipeline
from specqd.passes.subexpressions import CommonSubexpressions

X = torch.arange(6.0).reshape(2, 3) - 2


def test_what_is_computed_twice_is_computed_once_with_the_same_bits():
    program = of(lambda m, x: torch.exp(x + m.w) * torch.tanh(torch.exp(x + m.w)), X, w=torch.ones(3))
    result = CommonSubexpressions()(program)
    assert calls(program) == ["add", "exp", "add", "exp", "tanh", "mul"]
    assert calls(result.program) == ["add", "exp", "tanh", "mul"]
    assert result.rewrites == 2 and not result.refusals
    assert torch.equal(result.program.module()(X), program.module()(X))
    assert CommonSubexpressions()(result.program).rewrites == 0


DIFFERENT = {
    "another number": lambda m, x: (x + 1.0) * (x + 2.0),
    "0 and -0": lambda m, x: torch.atan2(x * 0.0, x) + torch.atan2(x * -0.0, x),
    "an int and a float": lambda m, x: torch.full((3,), 1) + x + torch.full((3,), 1.0),
    "an int and a bool": lambda m, x: torch.full((3,), 1) + x + torch.full((3,), True),
    "another dimension": lambda m, x: x.sum(0, keepdim=True) + x.sum(1, keepdim=True),
    "another order": lambda m, x: (x - m.w) + (m.w - x),
    "random numbers": lambda m, x: torch.rand_like(x) - torch.rand_like(x),
}


@pytest.mark.parametrize("function", DIFFERENT.values(), ids=DIFFERENT)
def test_what_only_looks_alike_stays(function):
    program = of(function, X, w=torch.ones(3))
    result = CommonSubexpressions()(program)
    assert result.rewrites == 0 and calls(result.program) == calls(program)


def test_two_equal_outputs_are_refused_and_one_of_them_is_read():
    program = of(lambda m, x: (torch.exp(x), torch.exp(x)), X)
    result = CommonSubexpressions()(program)
    assert result.rewrites == 0
    assert [r.why for r in result.refusals] == ["it and exp, which is the same, are both outputs"]
    read = CommonSubexpressions()(of(lambda m, x: (torch.neg(torch.exp(x)), torch.exp(x)), X))
    assert read.rewrites == 1 and calls(read.program) == ["exp", "neg"]


def test_a_language_model_keeps_what_writes_into_caches():
    def body(m, x, positions):
        q = x.reshape(1, -1, 1, DIM).transpose(1, 2)
        one, two = (torch.ops.specqd.causal_attention(q, q, q, 1.0, layer, 0, 0.0, None) for layer in (0, 1))
        return (one + two).reshape(1, -1, DIM) * torch.sin(x) + torch.sin(x)

    program = decoder(Decoder(body))
    result = CommonSubexpressions()(program)
    assert result.rewrites == 1
    assert torch.equal(logits(result.program), logits(program))


def test_two_reads_of_one_weight_are_the_same_argument():
    """Folding leaves a read for each constant that it stores."""

    def body(m, x):
        return (x * torch.exp(m.w)) / torch.cosh(x * torch.exp(m.w)) - torch.exp(m.w)

    program = of(body, X, w=torch.ones(3))
    folded = Pipeline.parse("fold-constants")(program)
    assert calls(folded) == ["mul", "mul", "cosh", "div", "sub"]
    result = CommonSubexpressions()(folded)
    assert result.rewrites == 1 and calls(result.program) == ["mul", "cosh", "div", "sub"]
    assert torch.equal(result.program.module()(X), program.module()(X))
    again = CommonSubexpressions()(result.program)
    assert again.rewrites == 0 and not again.refusals

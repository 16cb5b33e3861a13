import pytest
import torch
from small_programs import DIM, Decoder, logits, of, ops
from torch.testing import assert_close

from specqd.passes.conv1d_to_linear import Conv1dToLinear

WIDE = 48


def conv1d(m, x, _):
    """As transformers' Conv1D: addmm over flattened rows."""
    y = torch.addmm(m.b, x.view(-1, DIM), m.w).view(1, x.shape[1], WIDE)
    return torch.addmm(m.b2, y.view(-1, WIDE), m.w2).view(1, x.shape[1], DIM)


def decoder(body=conv1d):
    generator = torch.Generator().manual_seed(0)
    sizes = {"w": (DIM, WIDE), "b": (WIDE,), "w2": (WIDE, DIM), "b2": (DIM,), "s": (DIM, DIM)}
    return of(Decoder(body, **{n: torch.randn(s, generator=generator) for n, s in sizes.items()}))


def test_conv1d_becomes_a_linear_without_reshapes():
    program = decoder()
    result = Conv1dToLinear()(program)
    assert ops(program)[1:-1] == ["aten.reshape", "aten.addmm", "aten.reshape"] * 2
    assert ops(result.program)[1:-1] == ["aten.linear"] * 2
    assert result.rewrites == 2 and not result.refusals
    assert torch.equal(result.program.weights["w.transposed"], program.weights["w"].T)
    # The same sums; the kernel for a transposed matrix may order them differently.
    assert_close(logits(result.program), logits(program), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "body", [lambda m, x, _: x @ m.s, lambda m, x, _: torch.mm(x[0], m.s)[None]], ids=["matmul", "mm"]
)
def test_products_without_bias_become_linears(body):
    program = decoder(body)
    result = Conv1dToLinear()(program)
    assert result.rewrites == 1
    assert "aten.linear" in ops(result.program)[:-1]
    assert_close(logits(result.program), logits(program), rtol=1e-5, atol=1e-4)


REFUSED = {
    "factors": (
        lambda m, x, _: torch.addmm(m.b2, x[0], m.s, beta=0.5)[None],
        "it scales the bias or the product",
    ),
    "computed bias": (
        lambda m, x, _: torch.addmm(m.b2 * 2, x[0], m.s)[None],
        "its bias mul is not one stored number for each output",
    ),
    "a vector": (lambda m, x, _: x * (x @ m.b2)[..., None], "its matrix b2 is [64], not [inputs, outputs]"),
}


@pytest.mark.parametrize(("body", "why"), REFUSED.values(), ids=REFUSED)
def test_other_products_are_refused(body, why):
    program = decoder(body)
    result = Conv1dToLinear()(program)
    assert result.rewrites == 0 and ops(result.program) == ops(program)
    assert [r.why for r in result.refusals] == [why]


def test_a_second_run_rewrites_nothing():
    once = Conv1dToLinear()(decoder()).program
    assert Conv1dToLinear()(once).rewrites == 0

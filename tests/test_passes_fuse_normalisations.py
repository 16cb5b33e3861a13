import pytest
import torch
from small_modules import calls, of
from torch.testing import assert_close

from specqd.passes.fuse_normalisations import FuseNormalisations


def mean(x):
    return x.mean(-1, keepdim=True)


# (what is written, the operator that it is)
WRITTEN = {
    "differences divided": (
        lambda m, x: (x - mean(x)) / torch.sqrt(mean((x - mean(x)) ** 2) + 1e-6) * m.w + m.b,
        "layer_norm",
    ),
    "a root's reciprocal": (
        lambda m, x: m.b + m.w * ((d := x - mean(x)) * torch.rsqrt(mean(d * d) + 1e-6)),
        "layer_norm",
    ),
    "the variance of torch": (
        lambda m, x: m.w * ((x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)),
        "layer_norm",
    ),
    "dimensions from the front": (
        lambda m, x: (d := x - x.mean(2, keepdim=True)) / torch.sqrt(d.pow(2).mean(2, keepdim=True) + 1e-6),
        "layer_norm",
    ),
    "root mean square": (lambda m, x: x * torch.rsqrt(mean(x.pow(2)) + 1e-6) * m.w, "rms_norm"),
    "root mean square, divided": (lambda m, x: x / torch.sqrt(mean(x * x) + 1e-6), "rms_norm"),
}


def program_of(function, rng, width=8):
    x, w, b = (torch.randn(*size, generator=rng) for size in ((2, 3, 8), (width,), (width,)))
    return of(function, x, w=w, b=b), x


@pytest.mark.parametrize(("function", "operator"), WRITTEN.values(), ids=WRITTEN)
def test_each_way_to_write_it_becomes_one_operator(function, operator, rng):
    program, x = program_of(function, rng)
    result = FuseNormalisations()(program)
    assert calls(result.program) == [operator]
    assert result.rewrites == 1 and not result.refusals
    # Means of 8 numbers of order 1 in another order: some units in the last place.
    assert_close(result.program.module()(x), program.module()(x), rtol=2e-6, atol=2e-6)
    assert FuseNormalisations()(result.program).rewrites == 0


REFUSED = {
    "a sum": (
        lambda m, x: (d := x - mean(x)) / torch.sqrt((d * d).sum(-1, keepdim=True) + 1e-6),
        "sum_1 stands where mean would",
    ),
    "two dimensions": (
        lambda m, x: (d := x - mean(x)) / torch.sqrt((d * d).mean((-2, -1), keepdim=True) + 1e-6),
        "dim of mean_1 is [-2, -1] and not [-1]",
    ),
    "Bessel's correction": (
        lambda m, x: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-6),
        None,
    ),
}


@pytest.mark.parametrize(("function", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_norm_is_left_alone_and_said_so(function, why, rng):
    program, _ = program_of(function, rng)
    result = FuseNormalisations()(program)
    assert result.rewrites == 0 and calls(result.program) == calls(program)
    assert why is None or why in [r.why for r in result.refusals]


def test_weights_that_are_no_vector_stay_behind_the_norm(rng):
    x, w = torch.randn(2, 3, 8, generator=rng), torch.randn(3, 8, generator=rng)
    program = of(lambda m, x: x / torch.sqrt(mean(x * x) + 1e-6) * m.w, x, w=w)
    result = FuseNormalisations()(program)
    assert calls(result.program) == ["rms_norm", "mul"]
    assert [r.why for r in result.refusals] == ["its weight is [3, 8], not a vector of 8"]
    assert_close(result.program.module()(x), program.module()(x), rtol=2e-6, atol=2e-6)


def test_differences_from_a_mean_that_is_read_too_have_a_root_mean_square(rng):
    program, x = program_of(
        lambda m, x: (d := x - mean(x)) / torch.sqrt(mean(d * d) + 1e-6) + mean(x) + d, rng
    )
    result = FuseNormalisations()(program)
    assert calls(result.program) == ["mean", "sub", "rms_norm", "mean", "add", "add"]
    assert_close(result.program.module()(x), program.module()(x), rtol=2e-6, atol=2e-6)

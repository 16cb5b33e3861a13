import pytest
import torch
from small_modules import calls, of
from small_programs import DIM, Decoder, logits
from small_programs import of as decoder

from specqd.passes.fold_constants import FoldConstants

X, W = torch.arange(6.0).reshape(2, 3) - 2, torch.tensor([0.1, -0.7, 3.3])


def test_what_depends_on_weights_alone_is_stored_with_the_same_bits():
    program = of(lambda m, x: x * (torch.exp(m.w) * 2).unsqueeze(0) + torch.arange(3).float().sqrt(), X, w=W)
    result = FoldConstants()(program)
    assert calls(result.program) == ["mul", "add"]
    assert result.rewrites == 2 and not result.refusals
    assert sorted(result.program.weights) == ["sqrt", "w", "w.unsqueeze"]
    assert torch.equal(result.program.module()(X), program.module()(X))
    assert FoldConstants()(result.program).rewrites == 0


def test_a_constant_without_arguments_stays_and_so_does_what_an_input_reaches():
    program = of(lambda m, x: x + torch.arange(3) + x.shape[0], X)
    result = FoldConstants()(program)
    assert result.rewrites == 0 and not result.refusals and calls(result.program) == calls(program)


def test_parts_of_a_constant_are_stored_one_by_one():
    program = of(lambda m, x: x * m.w.chunk(3)[1] + m.w.chunk(3)[2], X, w=W)
    result = FoldConstants()(program)
    assert calls(result.program) == ["mul", "add"]
    assert torch.equal(result.program.module()(X), program.module()(X))


def test_a_large_result_is_refused_before_it_is_computed():
    refused = FoldConstants()(of(lambda m, x: (x + m.w.repeat(1 << 34)).sum(), X[:1, :1], w=W)).refusals
    assert [r.why for r in refused] == ["it would store 206,158,430,208 bytes in the place of 12"]


def test_the_room_for_results_is_an_option():
    program = of(lambda m, x: x + m.w.repeat(2, 1), X, w=W)
    assert FoldConstants()(program).rewrites == 1
    assert FoldConstants(spare_bytes=11)(program).rewrites == 0
    assert FoldConstants(spare_bytes=12)(program).rewrites == 1


def test_random_numbers_are_refused():
    refused = FoldConstants()(of(lambda m, x: x + torch.rand_like(m.w).neg(), X, w=W)).refusals
    assert [r.why for r in refused] == ["rand_like draws random numbers"]


def test_memory_that_nobody_has_filled_is_refused():
    refused = FoldConstants()(of(lambda m, x: x + torch.empty_like(m.w).neg(), X, w=W)).refusals
    assert [r.why for r in refused] == ["empty_like is memory that nobody has filled"]


def test_a_pruned_weight_is_refused():
    program = of(lambda m, x: x + m.w.neg(), X, w=W)
    program.dense["w"] = W
    refused = FoldConstants()(program).refusals
    assert [r.why for r in refused] == ["w is pruned, and a calibration may need it as it is"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_language_model_act_as_float32(dtype, rng):
    model = Decoder(lambda m, x, _: x * (1.0 + m.w), w=torch.randn(DIM, generator=rng)).to(dtype)
    program = decoder(model.float())
    program.weights["w"] = program.weights["w"].to(dtype)
    result = FoldConstants()(program)
    assert result.rewrites == 1 and result.program.weights["w.add"].dtype is torch.float32
    assert torch.equal(logits(result.program), logits(program))


def test_many_steps_that_each_read_the_one_before_twice_are_folded():
    def grown(m, x):
        w = m.w
        for _ in range(250):
            w = torch.sin(w) * w
        return x + w

    program = of(grown, X, w=W)
    result = FoldConstants()(program)
    assert calls(result.program) == ["add"]
    assert torch.equal(result.program.module()(X), program.module()(X))


def test_zeros_of_unlike_signs_are_two_weights():
    program = of(lambda m, x: (x / (m.w * 0.0), x / (m.w * -0.0)), X, w=W.abs() + 1)
    result = FoldConstants()(program)
    assert result.rewrites == 2 and {"w.mul", "w.mul~2"} < result.program.weights.keys()
    for after, before in zip(result.program.module()(X + 3), program.module()(X + 3), strict=True):
        assert torch.equal(after, before)

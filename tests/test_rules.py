import pytest
import torch
from small_modules import calls, of
from torch import Tensor
from torch.export import Dim

from specqd.passes import Pass, Refusal
from specqd.passes.rules import Rule, apply

X, W = torch.empty(2, 3, device="meta"), torch.empty(3, device="meta")


def scaled(x: Tensor, w: Tensor, by: float) -> Tensor:
    return torch.relu(x + w) * by


def clamped(x: Tensor, w: Tensor, by: float) -> Tensor:
    return (torch.clamp_min(x + w, 0)) * by


def no_negative(x: Tensor, w: Tensor, by: float) -> str | None:
    return f"{by} is negative" if by < 0 else None


def applied(program, *rules):
    """The program after rules, its rewrites and its refusals' reasons."""
    copy = program.copy()
    found = list(apply(copy, copy.target, rules))
    copy.target.graph.lint()
    return (
        copy,
        [f for f in found if not isinstance(f, Refusal)],
        [f.why for f in found if isinstance(f, Refusal)],
    )


ORDERS = {
    "as written": lambda m, x: torch.relu(x + m.w) * 3.5,
    "factors the other way round": lambda m, x: 3.5 * torch.relu(x + m.w),
    "summands the other way round": lambda m, x: torch.relu(m.w + x) * 3.5,
}


@pytest.mark.parametrize("function", ORDERS.values(), ids=ORDERS)
def test_a_rule_matches_in_any_order(function, rng):
    x = torch.randn(2, 3, generator=rng)
    program = of(function, x, w=torch.randn(3, generator=rng))
    after, made, refused = applied(program, Rule(scaled, clamped, (X, W), no_negative))
    assert calls(program) == ["add", "relu", "mul"] and calls(after) == ["add", "clamp_min", "mul"]
    assert len(made) == 1 and not refused
    assert torch.equal(after.module()(x), program.module()(x))
    again, more, _ = applied(after, Rule(scaled, clamped, (X, W), no_negative))
    assert not more and calls(again) == calls(after)


REFUSED = {
    "the guard": (lambda m, x: torch.relu(x + m.w) * -2.0, "-2.0 is negative"),
    "a value read elsewhere": (
        lambda m, x: (y := torch.relu(x + m.w)) * 2.0 + y,
        "relu is also used elsewhere",
    ),
    "half of it and then something else": (
        lambda m, x: torch.relu(x - m.w) * 2.0,
        "sub stands where add would",
    ),
    "another number": (
        lambda m, x: torch.relu(torch.add(x, m.w, alpha=3)) * 2.0,
        "alpha of add is 3 and not 1",
    ),
}


@pytest.mark.parametrize(("function", "why"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_match_is_left_alone_and_said_so(function, why, rng):
    program = of(function, torch.randn(2, 3, generator=rng), w=torch.randn(3, generator=rng))
    after, made, refused = applied(program, Rule(scaled, clamped, (X, W), no_negative))
    assert not made and refused == [why] and calls(after) == calls(program)


def test_a_replacement_of_another_shape_or_dtype_is_refused():
    program = of(lambda m, x: torch.relu(x), torch.ones(2, 3))
    for after, why in (
        (lambda x: x.sum(-1), "the replacement would give float32 [2] and not float32 [2, 3]"),
        (lambda x: x.double(), "the replacement would give float64 [2, 3] and not float32 [2, 3]"),
        (lambda x: x.reshape(5), "the replacement does not take float32 [2, 3]"),
    ):
        _, made, refused = applied(program, Rule(lambda x: torch.relu(x), after, (X,)))
        assert not made and len(refused) == 1 and refused[0].startswith(why)


def test_dimensions_count_from_either_end_and_sizes_stay_open(rng):
    def before(x: Tensor) -> Tensor:
        return torch.softmax(x, -1).transpose(-2, -1)

    def after(x: Tensor) -> Tensor:
        return torch.softmax(x.reshape(x.shape[0], -1, x.shape[-1]), -1).transpose(1, 2)

    x = torch.randn(2, 5, 3, generator=rng)
    dynamic = {0: Dim("b", max=9), 1: Dim("s", max=9)}
    program = of(lambda m, x: torch.softmax(x, 2).transpose(1, 2), x, dynamic=(dynamic,))
    changed, made, _ = applied(program, Rule(before, after, (torch.empty(2, 3, 4, device="meta"),)))
    assert len(made) == 1 and "reshape" in calls(changed)
    other = torch.randn(4, 7, 3, generator=rng)
    assert torch.equal(changed.module()(other), program.module()(other))


@pytest.mark.parametrize(
    ("after", "guard"),
    [
        (lambda x: torch.neg(x) if x.shape[0] == 4 else torch.abs(x), lambda x: None),
        (lambda x: torch.abs(x), lambda x: None if x.shape[0] % 2 == 0 else "odd"),
    ],
)
def test_what_holds_for_the_example_is_not_taken_for_all_sizes(after, guard):
    rule = Rule(lambda x: torch.neg(x), after, (X,), guard)
    body, x = (lambda m, x: torch.neg(x) + torch.neg(torch.relu(x))), torch.ones(4, 3)
    _, made, refused = applied(of(body, x, dynamic=({0: Dim("b", max=9)},)), rule)
    assert not made and len(refused) == 2
    assert all(why.startswith("the rule is for ") and why.endswith("a size that is open") for why in refused)
    _, made, refused = applied(of(body, x), rule)
    assert len(made) == 2 and not refused


def test_equal_calls_in_two_places_are_one_value_of_the_rule(rng):
    rule = Rule(lambda x: x * torch.sigmoid(x), lambda x: torch.nn.functional.silu(x), (X,))
    x = torch.randn(2, 3, generator=rng)
    program = of(lambda m, x: torch.abs(x) * torch.sigmoid(torch.abs(x)), x)
    after, made, _ = applied(program, rule)
    assert len(made) == 1 and "silu" in calls(after)
    _, made, _ = applied(of(lambda m, x: torch.abs(x) * torch.sigmoid(torch.neg(x)), x), rule)
    assert not made
    _, made, _ = applied(of(lambda m, x: torch.bernoulli(x) * torch.sigmoid(torch.bernoulli(x)), x), rule)
    assert not made  # two draws
    _, made, _ = applied(of(lambda m, x: (x + 0.0) * torch.sigmoid(x + -0.0), x), rule)
    assert not made  # the sum of -0.0 and 0.0 is 0.0, and that of two -0.0 is -0.0


def test_a_rule_may_leave_nothing_but_its_argument():
    rule = Rule(lambda x: torch.neg(torch.neg(x)), lambda x: x, (X,))
    program = of(lambda m, x: torch.neg(torch.neg(torch.neg(torch.neg(x)))) + 1, torch.ones(2, 3))
    after, made, _ = applied(program, rule)
    assert calls(after) == ["add"] and len(made) == 2


def test_whole_numbers_and_lists_of_tensors_are_matched_too(rng):
    def before(x: Tensor, w: Tensor, by: int) -> Tensor:
        return torch.roll(torch.cat([x, w], 0), by, 1)

    def after(x: Tensor, w: Tensor, by: int) -> Tensor:
        return torch.cat([torch.roll(x, by, 1), torch.roll(w, by, 1)], 0)

    x = torch.randn(2, 3, generator=rng)
    program = of(lambda m, x: torch.roll(torch.cat([x.neg(), x], 0), 2, 1), x)
    changed, made, _ = applied(program, Rule(before, after, (X, X)))
    assert len(made) == 1 and calls(changed) == ["neg", "roll", "roll", "cat"]
    assert torch.equal(changed.module()(x), program.module()(x))


def test_a_whole_number_is_not_matched_by_another():
    def before(x: Tensor, by: int) -> Tensor:
        return torch.relu(x) * by

    rule = Rule(before, lambda x, by: torch.relu(x * by), (X,))
    for by, rewrites in ((2, 1), (2.5, 0), (2.0, 0)):
        _, made, refused = applied(of(lambda m, x, by=by: torch.relu(x) * by, torch.ones(2, 3)), rule)
        assert len(made) == rewrites and len(made) + len(refused) <= 1


def test_a_pass_of_rules_keeps_where_it_comes_from():
    class Scaled(Pass):
        """Clamp."""

        name = "scaled-in-a-test"

        def run(self, program, entry):
            yield from apply(program, entry, (Rule(scaled, clamped, (X, W)),))

    try:
        program = of(ORDERS["as written"], torch.ones(2, 3), w=torch.ones(3))
        result = Scaled()(program)
    finally:
        del Pass.registry["scaled-in-a-test"]
    (made,) = (n for n in result.program.target.graph.nodes if n.name in result.rewritten)
    assert result.rewrites == 1 and made.meta["replaces"] == "mul" and "stack_trace" in made.meta

"""sparsify: which weights become zero, against torch's own pruning and the published rules computed independently."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import specqd
from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.prune.allocation import allocate
from specqd.passes.prune.calibration_data import Data
from specqd.passes.prune.pattern import Pattern, keep_n_of_m, smallest, smallest_of_rows
from specqd.passes.prune.sensitivity import LEVELS, errors_at_levels, units_of_least_error
from specqd.passes.prune.sparsify import Sparsify
from specqd.reference import run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path / "cache"))


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


WEIGHTS = ["0.weight", "2.weight", "4.weight", "8.weight"]


@pytest.fixture
def net(rng):
    net = network()
    for at, parameter in enumerate(net.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1 * (at + 1)
    return net


@pytest.fixture
def x(rng):
    return torch.randn(8, 3, 12, 12, generator=rng)


@pytest.fixture
def program(net, x):
    return specqd.capture(net, (x,))


def zeros(program, names=WEIGHTS):
    return [int((program.weights[name] == 0).sum()) for name in names]


def share(program, names=WEIGHTS):
    return sum(zeros(program, names)) / sum(program.weights[name].numel() for name in names)


# Magnitude


def test_global_magnitude_is_torchs_global_unstructured(program, net):
    after = Sparsify(sparsity=0.6, allocation="global")(program).program
    layers = [(net[at], "weight") for at in (0, 2, 4, 8)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.6)
    for at, name in zip((0, 2, 4, 8), WEIGHTS, strict=True):
        assert torch.equal(after.weights[name], net[at].weight)


def test_normalised_magnitude_is_torchs_with_normalised_scores(program, net):
    after = Sparsify(sparsity=0.6)(program).program
    layers = [(net[at], "weight") for at in (0, 2, 4, 8)]
    scores = {(m, name): m.weight / m.weight.norm() for m, name in layers}
    prune.global_unstructured(layers, prune.L1Unstructured, importance_scores=scores, amount=0.6)
    for at, name in zip((0, 2, 4, 8), WEIGHTS, strict=True):
        assert torch.equal(after.weights[name], net[at].weight)


def test_uniform_is_torchs_layer_by_layer(program, net):
    after = Sparsify(sparsity=0.6, allocation="uniform")(program).program
    for at, name in zip((0, 2, 4, 8), WEIGHTS, strict=True):
        prune.l1_unstructured(net[at], "weight", amount=0.6)
        assert torch.equal(after.weights[name], net[at].weight)


def test_erk_densities_are_in_proportion(program):
    after = Sparsify(sparsity=0.6, allocation="erk")(program).program
    shapes = [after.weights[name].shape for name in WEIGHTS]
    densities = [1 - n / s.numel() for n, s in zip(zeros(after), shapes, strict=True)]
    ratios = [d / (sum(s) / s.numel()) for d, s in zip(densities, shapes, strict=True) if d < 1]
    assert max(ratios) / min(ratios) == pytest.approx(1, abs=0.01)
    assert densities[1] == 1  # the depthwise one would need more than it has


@pytest.mark.parametrize("allocation", ["normalised", "global", "uniform", "erk", "sensitivity"])
@pytest.mark.parametrize("sparsity", [0.0, 0.65])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_share_is_what_was_asked_for_and_a_second_run_changes_nothing(
    program, x, allocation, sparsity, method
):
    action = Sparsify(sparsity=sparsity, method=method, allocation=allocation, data=Data.of(x))
    result = action(program)
    assert share(result.program) == pytest.approx(sparsity, abs=0.005)
    assert result.rewrites == (4 if sparsity and allocation != "erk" else result.rewrites)
    again = action(result.program)
    assert again.rewrites == 0 and zeros(again.program) == zeros(result.program)
    assert not program.dense and zeros(program) == [0] * 4


def test_the_rest_of_the_program_stays_and_the_dense_weights_too(program, x):
    after = Pipeline.parse("sparsify{sparsity=0.5}")(program)
    assert str(after.target.graph) == str(program.target.graph)
    assert set(after.dense) == set(WEIGHTS)
    assert all(after.dense[name] is program.weights[name] for name in WEIGHTS)
    after.weights |= after.dense
    assert torch.equal(run(after, after.target, x), run(program, program.target, x))


def test_history_and_explain_say_how_much_is_zero(program):
    after = Sparsify(sparsity=0.5, allocation="uniform")(program).program
    noted = dict(after.history[-1].noted)
    assert noted["conv2d"] == "50.0% of the 432 weights of 0.weight are zero"
    assert noted[""] == "50.0% of the 4,160 weights of layers that can be pruned are zero"
    assert "  target: 50.0% of the 4,160 weights" in str(after)
    text = str(specqd.explain(program, "sparsify{sparsity=0.5,allocation=uniform}"))
    assert "0 refusals, 9 -> 9 nodes; 50.0% of the 4,160 weights" in text
    assert "50.0% of the 432 weights of 0.weight are zero" in text


# Sensitivity


def test_no_other_choice_of_levels_has_less_error_together():
    """By trying all of them, for three layers of ten units and curves that are convex."""
    rng = np.random.default_rng(0)
    for wanted in range(1, 30):
        slopes = np.sort(rng.uniform(0, 1, (3, 10)), axis=1) ** 2
        curves = np.concatenate([np.zeros((3, 1)), slopes.cumsum(1)], 1)
        known = [torch.from_numpy(np.interp(LEVELS, np.linspace(0, 1, 11), curve)) for curve in curves]
        got = units_of_least_error(wanted / 30, [10, 10, 10], known)
        assert sum(got) == wanted
        every = [levels for levels in np.ndindex(11, 11, 11) if sum(levels) == wanted]
        costs = [sum(c[n] for c, n in zip(curves, levels, strict=True)) for levels in every]
        assert sum(c[n] for c, n in zip(curves, got, strict=True)) <= min(costs) + 1e-9


def test_errors_at_levels_are_those_of_outputs_without_their_means(rng):
    x, weight = torch.randn(200, 12, generator=rng).double() + 2, torch.randn(1, 5, 12, generator=rng)
    rows = torch.cat([x, torch.ones(200, 1)], 1)
    got = errors_at_levels(weight, weight**2, (rows.mT @ rows)[None], Pattern())
    order = weight.abs().flatten().argsort()
    for level, error in zip(LEVELS, got, strict=True):
        gone = torch.zeros(60).index_fill(0, order[: round(level * 60)], 1).reshape(5, 12)
        lost, whole = x @ (weight[0] * gone).T.double(), x @ weight[0].T.double()
        assert float(error) == pytest.approx(
            float(lost.var(0).sum() / whole.var(0).sum()), rel=1e-9, abs=1e-12
        )


def test_layers_whose_outputs_suffer_least_get_most_zeros(rng):
    """Two equal layers: the inputs of the second depend on each other, and small weights read what hardly varies."""
    weight = torch.cat([torch.randn(16, 16, generator=rng), 0.3 * torch.randn(16, 16, generator=rng)], 1)
    net = nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 16)])

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return net[0](x) + net[1](y)

    for linear in net:
        linear.weight.data = weight.clone()
    x, y = torch.randn(2, 64, 32, generator=rng)
    y[:, 16:] *= 0.01
    program = specqd.capture(Both(), (x, y))
    after = Sparsify(sparsity=0.4, allocation="sensitivity", data=Data.of(x, y))(program).program
    first, second = zeros(after, ["net.0.weight", "net.1.weight"])
    assert second > 1.3 * first


# Patterns


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_n_of_m_neighbours_along_the_channels_stay(program, x, pattern, kept, of, method):
    result = Sparsify(method=method, pattern=pattern, data=Data.of(x))(program)
    assert {r.node: r.why for r in result.refusals} == {
        "conv2d": f"its 3 input channels a group are no multiple of {of}, so 0.weight cannot have the pattern",
        "conv2d_1": f"its 1 input channels a group are no multiple of {of}, so 2.weight cannot have the pattern",
    }
    for name in ("4.weight", "8.weight"):
        new = result.program.weights[name]
        groups = new.movedim(1, -1).reshape(-1, of)
        assert ((groups != 0).sum(1) == kept).all()
    if method == "magnitude":
        old = program.weights["8.weight"].reshape(-1, of)
        wanted = old * (old.abs() >= old.abs().sort(1, descending=True).values[:, kept - 1 : kept])
        assert torch.equal(result.program.weights["8.weight"], wanted.reshape(10, 128))


@pytest.mark.parametrize(("pattern", "rows", "columns"), [("1x4", 1, 4), ("16x1", 16, 1), ("4x2", 4, 2)])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_blocks_are_zero_as_a_whole_or_not_at_all(program, x, pattern, rows, columns, method):
    wide = specqd.capture(
        nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(32, 48)), (torch.ones(1, 8, 3, 3),)
    )
    data = Data.of(torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(1)).split(1)[0])
    result = Sparsify(sparsity=0.5, method=method, pattern=pattern, data=data)(wide)
    assert not result.refusals
    assert share(result.program, ["0.weight", "2.weight"]) == pytest.approx(0.5, abs=0.005)
    for name in ("0.weight", "2.weight"):
        new = result.program.weights[name]
        new = new.movedim(1, -1).reshape(new.shape[0], -1)
        blocks = (new != 0).unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2).flatten(2)
        assert (blocks.all(2) | ~blocks.any(2)).all()


# Methods that look at data


def rows_of(program, module, x):
    """Inputs of the last linear."""
    return module[:-1](x).detach()


def test_wanda_is_the_published_rule(program, net, x):
    """Weights |w| * ||x_j||, compared within an output row: the prune.py of its authors, for the last linear."""
    after = Sparsify(sparsity=0.5, method="wanda", allocation="uniform", data=Data.of(x))(program).program
    metric = net[8].weight.abs() * rows_of(program, net, x).norm(dim=0)
    drop = torch.sort(metric, dim=-1, stable=True).indices[:, : 128 // 2]
    wanted = net[8].weight.detach().scatter(1, drop, 0)
    assert torch.equal(after.weights["8.weight"], wanted)


def test_sparsegpt_is_the_published_algorithm(program, net, x):
    """One layer by the optimal-brain-surgeon definition in float64: after each column, the rest is solved anew.

    Zeros are chosen for the whole block by w^2 / (H^-1 of what is left)_jj as in the authors' sparsegpt.py; instead of
    their Cholesky factor, the inverse of the trailing part of H is computed at every column.
    """
    after = Sparsify(sparsity=0.5, method="sparsegpt", allocation="uniform", data=Data.of(x))(program).program
    rows = rows_of(program, net, x).double().numpy()
    hessian = rows.T @ rows
    live = np.diag(hessian) > 0
    hessian[~live] = 0
    hessian[:, ~live] = 0
    hessian[np.diag_indices(128)] += np.where(live, 0.01 * np.diag(hessian)[live].mean(), 1.0)
    weight = net[8].weight.detach().double().numpy().copy()
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(128)]
    scores = weight**2 / np.array([inverse[0, 0] for inverse in inverses])
    scores[:, ~live] *= 1e-12  # what is always zero is first to go
    gone = np.zeros(weight.size, dtype=bool)
    gone[np.argsort(scores.ravel(), kind="stable")[: weight.size // 2]] = True
    gone = gone.reshape(weight.shape)
    for j, inverse in enumerate(inverses):
        error = np.where(gone[:, j], weight[:, j], 0) / inverse[0, 0]
        weight[:, j:] -= np.outer(error, inverse[0])
        weight[gone[:, j], j] = 0
    got = after.weights["8.weight"]
    assert np.array_equal(got.numpy() == 0, weight == 0)
    # float32 against float64, over 128 columns of elimination.
    torch.testing.assert_close(got.double(), torch.from_numpy(weight), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", ["any", "2:4"])
def test_outputs_stay_nearer_with_sparsegpt_than_with_wanda_than_with_magnitude(rng, pattern):
    mix = torch.randn(64, 64, generator=rng) * torch.rand(64, generator=rng) ** 2 * 4
    x, linear = torch.randn(400, 64, generator=rng) @ mix, nn.Linear(64, 48)
    program = specqd.capture(linear, (x,))
    errors = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        action = Sparsify(sparsity=0.5, method=method, pattern=pattern, data=Data.of(x))
        errors.append(float((run(action(program).program, program.target, x) - linear(x).detach()).norm()))
    assert errors[0] < errors[1] < errors[2]


def test_tied_weights_are_pruned_once(rng):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    x = torch.randn(9, 8, generator=rng)
    result = Sparsify(sparsity=0.5)(specqd.capture(Tied(), (x,)))
    assert result.rewrites == 1 and zeros(result.program, ["first.weight"]) == [32]
    assert len(result.program.history[-1].noted) == 2


def test_another_entry_keeps_its_weights(program, x):
    program.entries["other"] = program.target.copy()
    program.entries["other"].name = "other"
    after = Sparsify(sparsity=0.5)(program, "other").program
    assert torch.equal(run(after, after.target, x), run(program, program.target, x))
    assert set(after.dense) == {f"{name}.pruned" for name in WEIGHTS}
    assert share(after, list(after.dense)) == pytest.approx(0.5, abs=0.005)


# Selections, by their definitions


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=8, max_size=8), st.integers(0, 8))
def test_smallest_marks_that_many_and_none_above_one_left(values, count):
    scores = torch.tensor(values).float().reshape(2, 4)
    marked = smallest(scores, count)
    assert int(marked.sum()) == count
    if 0 < count < 8:
        assert scores[marked].max() <= scores[~marked].min()
    by_row = smallest_of_rows(scores, count)
    assert int(by_row.sum()) == count and int(by_row.sum(1).max() - by_row.sum(1).min()) <= 1
    for row, chosen in zip(scores, by_row, strict=True):
        assert not chosen.any() or chosen.all() or row[chosen].max() <= row[~chosen].min()


def test_every_order_of_four_keeps_its_two_largest():
    for order in torch.cartesian_prod(*[torch.arange(4.0)] * 4):
        kept = order[~keep_n_of_m(order, Pattern.parse("2:4"))]
        assert torch.equal(kept.sort().values, order.sort().values[2:])


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["normalised", "global", "uniform", "erk"]), st.floats(0.3, 0.99), st.integers(0, 99))
def test_allocations_add_up(how, sparsity, seed):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(40, 30), (25, 4, 3, 3), (60, 50)]
    magnitudes = [torch.rand(shape, generator=rng).round(decimals=1) for shape in shapes]  # with ties
    counts = allocate(how, sparsity, magnitudes, shapes)
    sizes = [m.numel() for m in magnitudes]
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert abs(sum(counts) - sparsity * sum(sizes)) <= 2


# Refusals and bad input


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("sparsity=1", r"sparsify: a sparsity of 1.0 is out of range; give 0 or more, less than 1"),
        ("sparsity=-0.1", "a sparsity of -0.1 is out of range"),
        ("sparsity=nan", "a sparsity of nan is out of range"),
        ("pattern=4:2", "the pattern '4:2' is none: give any, N:M with N below M such as 2:4"),
        ("pattern=4:4", "the pattern '4:4' is none"),
        ("pattern=0x4", "the pattern '0x4' is none"),
        ("pattern=dense", "the pattern 'dense' is none"),
        ("method=best", r"option method: 'best' is not one of magnitude \| wanda \| sparsegpt"),
        (
            "allocation=best",
            r"option allocation: 'best' is not one of normalised \| global \| uniform \| erk \| sensitivity",
        ),
    ],
)
def test_an_option_out_of_range_is_an_error(options, why):
    with pytest.raises(InputError, match=why):
        Pipeline.parse(f"sparsify{{{options}}}")


def test_text_round_trips():
    text = 'sparsify{sparsity=0.5,method=wanda,pattern=2:4,ignore=fc.*|0.weight,data="my images"}'
    assert str(Pipeline.parse(text)) == text


def test_a_share_that_whole_units_cannot_reach_is_an_error(rng):
    program = specqd.capture(nn.Linear(4, 16), (torch.ones(1, 4),))
    with pytest.raises(InputError, match=r"reached a sparsity of 75.0% where 65.0% was asked for"):
        Sparsify(pattern="16x1")(program)


def test_nothing_fits(program):
    result = Sparsify(pattern="3:7")(program)
    assert result.rewrites == 0 and len(result.refusals) == 4


def test_weights_that_are_not_finite_are_refused_and_the_rest_pruned(program):
    program.weights["4.weight"] = program.weights["4.weight"].clone()
    program.weights["4.weight"][0, 0, 0, 0] = torch.nan
    result = Sparsify(sparsity=0.5)(program)
    assert [(r.node, r.why) for r in result.refusals] == [
        ("conv2d_2", "4.weight holds NaN, infinity or no floating-point numbers")
    ]
    assert result.rewrites == 3


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_not_finite_are_refused(program, x, method):
    program.weights["2.bias"] = torch.full_like(program.weights["2.bias"], torch.inf)
    action = Sparsify(sparsity=0.5, method=method, allocation="uniform", data=Data.of(x))
    result = action(program)
    assert [(r.node, r.why) for r in result.refusals] == [
        (node, "its input is NaN or infinite on the calibration data") for node in ("conv2d_2", "linear")
    ]
    assert result.rewrites == 2


def test_ignored_layers_do_not_count(program):
    result = Sparsify(sparsity=0.7, ignore=("0.*", "8.weight"))(program)
    assert zeros(result.program)[0] == zeros(result.program)[3] == 0
    assert share(result.program, ["2.weight", "4.weight"]) == pytest.approx(0.7, abs=0.005)
    with pytest.raises(InputError, match=r"ignore=fc\.\* matches no weight"):
        Sparsify(ignore=("fc.*",))(program)

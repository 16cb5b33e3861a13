"""calibrate: the layer-wise problem against numpy's least squares and torch's Adam on the activations themselves."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import specqd
import specqd.passes.prune.calibrate as module
from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.prune.calibrate import Calibrate
from specqd.passes.prune.calibration_data import Data
from specqd.passes.prune.layers import prunable
from specqd.passes.prune.least_squares import adam, corrected, output_error, solve
from specqd.passes.prune.sparsify import Sparsify
from specqd.reference import run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def x(rng):
    # Channels that depend on each other, so that some can make good for others.
    return torch.einsum(
        "bchw,cd->bdhw", torch.randn(24, 3, 10, 10, generator=rng), torch.randn(3, 6, generator=rng)
    )


@pytest.fixture
def net(rng):
    net = nn.Sequential(
        nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.ReLU(),
        nn.Conv2d(16, 8, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3
    return net


@pytest.fixture
def program(net, x):
    return specqd.capture(net, (x,))


@pytest.fixture
def sparse(program):
    return Sparsify(sparsity=0.6, allocation="uniform")(program).program


def rows_of(program, layer, x):
    """Rows of a layer, with ones, float64: what its inputs are in the model as it is, gathered by a hook's means."""
    from specqd.reference import Interpreter

    seen = {}

    class Spy(Interpreter):
        def run_node(self, node):
            if node is layer.nodes[0]:
                seen["x"] = self.env[node.args[0]]
            return super().run_node(node)

    with torch.no_grad():
        Spy(program, program.target).run(x)
    rows = layer.rows(layer.nodes[0], seen["x"]).double()
    return torch.cat([rows, torch.ones(*rows.shape[:2], 1)], 2)


def matrices(program, layer):
    return module._with_bias(program.weights, layer)


# The problem


def test_the_closed_form_is_numpys_least_squares_on_the_rows(program, sparse, x):
    after = Calibrate(data=Data.of(x), damping=0.1)(sparse).program
    for before, layer in zip(prunable(program, program.target), prunable(after, after.target), strict=True):
        dense, got = matrices(program, before), matrices(after, layer)
        support = matrices(sparse, layer) != 0
        support[..., -1] = layer.bias is not None
        assert not got[~support].any()
        rows = rows_of(program, before, x)
        near = corrected(dense, matrices(sparse, layer), support, rows.mT @ rows)
        damping = 0.1 * (rows[..., :-1] ** 2).sum(1).mean(1)
        for group in range(layer.groups):
            for row in range(dense.shape[1]):
                kept = support[group, row].numpy()
                ridge = np.sqrt(float(damping[group])) * np.eye(dense.shape[2])[:-1]
                system = np.concatenate([rows[group].numpy(), ridge])
                wanted = np.concatenate(
                    [rows[group].numpy() @ dense[group, row].numpy(), ridge @ near[group, row].numpy()]
                )
                solution = np.linalg.lstsq(system[:, kept], wanted, rcond=None)[0]
                # Gram matrices of float32 products; weights are stored in float32.
                assert_close(got[group, row][support[group, row]].numpy(), solution, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("damping", [1e-1, 1e-5])
def test_inputs_that_depend_on_each_other_are_solved_for_as_well(rng, damping):
    rows = torch.randn(2, 300, 5, generator=rng).double() @ torch.randn(5, 40, generator=rng).double()
    rows = torch.cat([3 + rows + 0.01 * torch.randn(2, 300, 40, generator=rng), torch.ones(2, 300, 1)], 2)
    dense, near = (torch.randn(2, 7, 41, generator=rng).double() for _ in range(2))
    support = torch.rand(2, 7, 41, generator=rng) < 0.5
    gram = rows.mT @ rows
    got = solve(dense, near, support, gram, damping)
    price = damping * gram.diagonal(0, 1, 2)[:, :-1].mean(1)

    def cost(group, row, weights):
        away = (weights - near[group, row])[:-1][support[group, row, :-1]]
        return float(
            ((rows[group] @ (weights - dense[group, row])) ** 2).sum() + price[group] * (away**2).sum()
        )

    for group, row in np.ndindex(2, 7):
        kept = support[group, row]
        system = gram[group][kept][:, kept] + torch.diag(price[group] * (kept.nonzero()[:, 0] < 40))
        wanted = (gram[group] @ dense[group, row])[kept] + price[group] * torch.where(
            kept.nonzero()[:, 0] < 40, near[group, row][kept], 0
        )
        best = torch.zeros(41).double()
        best[kept] = torch.linalg.solve(system, wanted)
        least, start = cost(group, row, best), cost(group, row, near[group, row] * kept)
        assert cost(group, row, got[group, row]) - least < 1e-5 * (start - least)


def test_a_full_support_gives_the_dense_weights_back(rng):
    rows = torch.cat([torch.randn(1, 90, 12, generator=rng), torch.ones(1, 90, 1)], 2).double()
    dense = torch.randn(1, 5, 13, generator=rng).double()
    got = solve(dense, dense, torch.ones_like(dense, dtype=torch.bool), rows.mT @ rows, 1e-2)
    assert_close(got, dense, rtol=1e-9, atol=1e-9)


def test_inputs_that_are_always_zero_leave_the_weights_where_they_are_to_be_near(rng):
    rows = torch.cat([torch.randn(1, 90, 12, generator=rng), torch.ones(1, 90, 1)], 2).double()
    rows[..., 3] = 0
    dense = torch.randn(1, 5, 13, generator=rng).double()
    support = torch.rand(1, 5, 13, generator=rng) < 0.5
    support[..., 3] = True
    near = torch.randn(1, 5, 13, generator=rng).double()
    got = solve(dense, near, support, rows.mT @ rows, 1e-4)
    assert_close(got[..., 3], near[..., 3], rtol=1e-9, atol=1e-9)
    biases_alone = torch.diag(torch.tensor([0.0] * 12 + [90])).double()[None]
    nothing = solve(dense, near, support, biases_alone, 1e-4)
    assert_close(nothing[..., :-1], (near * support)[..., :-1], rtol=1e-9, atol=1e-9)


def test_adam_is_torchs_on_the_activations(rng):
    rows = torch.cat([torch.randn(1, 90, 12, generator=rng), torch.ones(1, 90, 1)], 2)
    dense = torch.randn(1, 5, 13, generator=rng)
    support = torch.rand(1, 5, 13, generator=rng) < 0.5
    support[..., -1] = True
    start = dense * support
    got = adam(dense.double(), start.double(), support, (rows.mT @ rows).double(), 300)
    weight, bias = (p.clone().requires_grad_() for p in (start[0, :, :-1], start[0, :, -1]))
    optimiser = torch.optim.Adam([{"params": [weight], "lr": 1e-5}, {"params": [bias], "lr": 1e-4}])
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.mse_loss(rows[0, :, :-1] @ weight.T + bias, rows[0] @ dense[0].T).backward()
        weight.grad *= support[0, :, :-1]
        optimiser.step()
    # 300 steps of 1e-5 and 1e-4, of which roundings may turn a few around.
    assert_close(got[0, :, :-1], weight.detach(), rtol=0, atol=1e-5)
    assert_close(got[0, :, -1], bias.detach(), rtol=0, atol=1e-5)


def test_corrections_give_deviations_and_means_back(rng):
    rows = torch.cat([torch.randn(1, 90, 12, generator=rng) + 1, torch.ones(1, 90, 1)], 2).double()
    dense = torch.randn(1, 5, 13, generator=rng).double()
    support = torch.rand(1, 5, 13, generator=rng) < 0.5
    support[..., -1] = True
    pruned = dense * support
    got = corrected(dense, pruned, support, rows.mT @ rows)
    # POT's formula, entry by entry.
    for row in range(5):
        old, new = dense[0, row, :-1].numpy(), pruned[0, row, :-1].numpy()
        scale = old.std() / (new.std() + 1e-9)
        wanted = (scale * new + old.mean() - (scale * new).mean()) * support[0, row, :-1].numpy()
        assert_close(got[0, row, :-1].numpy(), wanted, rtol=1e-9, atol=1e-9)
    assert_close((rows @ got.mT).mean(1), (rows @ dense.mT).mean(1), rtol=1e-9, atol=1e-9)


# The pass


@pytest.mark.parametrize("method", ["closed", "adam", "correct"])
def test_outputs_come_nearer_and_zeros_stay(program, sparse, x, rng, method):
    result = Calibrate(data=Data.of(x), method=method, steps=200)(sparse)
    after = result.program
    assert str(after.target.graph) == str(program.target.graph)
    for name, weight in after.weights.items():
        assert torch.equal(weight == 0, sparse.weights[name] == 0)
    for layer in prunable(after, after.target):
        rows, dense = (
            rows_of(program, layer_of(program, layer), x),
            matrices(program, layer_of(program, layer)),
        )
        before, now = (
            output_error(matrices(p, layer) - dense, rows.mT @ rows) / output_error(dense, rows.mT @ rows)
            for p in (sparse, after)
        )
        assert now <= before
        told = f"its output's squared error went from {before:.2%} of the output to "
        assert dict(after.history[-1].noted)[layer.name].startswith(told)


def layer_of(program, like):
    return next(one for one in prunable(program, program.target) if one.weight == like.weight)


def test_no_method_comes_nearer_in_any_layer_than_the_closed_form(program, sparse, x):
    def errors(method):
        after = Calibrate(data=Data.of(x), method=method)(sparse).program
        found = []
        for layer in prunable(after, after.target):
            own = layer_of(program, layer)
            rows = rows_of(program, own, x)
            found.append(output_error(matrices(after, layer) - matrices(program, own), rows.mT @ rows))
        return torch.stack(found)

    closed, by_adam, correct = map(errors, ("closed", "adam", "correct"))
    # It holds weights near corrected ones, where both others begin.
    assert (closed <= 1.001 * torch.minimum(by_adam, correct)).all()


def test_a_second_run_changes_nothing_and_another_pruning_allows_one(sparse, x):
    action = Calibrate(data=Data.of(x))
    once = action(sparse).program
    again = action(once)
    assert again.rewrites == 0
    assert {r.why for r in again.refusals} == {f"{n}.weight is calibrated already" for n in (0, 2, 4, 8)}
    more = Sparsify(sparsity=0.7, allocation="uniform")(again.program).program
    assert all(torch.equal(more.dense[name], sparse.dense[name]) for name in sparse.dense)
    assert action(more).rewrites == 4


def test_a_pipeline_in_levels_is_text(program, x):
    calibrate = "calibrate{data=random,samples=4}"
    text = f"sparsify{{sparsity=0.5}}, {calibrate}, sparsify{{sparsity=0.6}}, {calibrate}"
    after = Pipeline.parse(text)(specqd.capture(program.module(), (x[:4],)))
    assert str(Pipeline.parse(text)) == text
    assert [e.step for e in after.history] == text.split(", ")
    assert all(event.rewritten for event in after.history)


def test_the_same_data_give_the_same_bits_and_other_data_others(sparse, x, monkeypatch, tmp_path):
    one = Calibrate(data=Data.of(x))(sparse).program.weights
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path / "another"))
    two = Calibrate(data=Data.of(x))(sparse).program.weights
    other = Calibrate(data=Data.of(x[:12]))(
        Sparsify(sparsity=0.6)(specqd.capture(sparse.module(), (x[:12],))).program
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other.program.weights[name]) for name in one)


def test_what_was_broken_off_goes_on_where_it_was(sparse, x, cache, monkeypatch):
    whole = Calibrate(data=Data.of(x))(sparse).program.weights
    kept = sorted((cache / "calibration").glob("*/*"))
    assert len(kept) == 4
    kept[1].unlink()
    told, solved = [], []
    monkeypatch.setattr(module, "solve", lambda *given: solved.append(1) or solve(*given))
    again = Calibrate(data=Data.of(x))(sparse, None, lambda *what: told.append(what)).program.weights
    assert len(solved) == 1
    assert told == [("solving layers", 3, 4), ("running the dense model", 0, 1), ("solving layers", 4, 4)]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_it_composes_with_fold_batch_norm_in_either_order(rng, x):
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()
    net[1].running_var += torch.rand(8, generator=rng)
    net[1].running_mean += torch.randn(8, generator=rng)
    program = specqd.capture(net, (x,))
    wanted = net(x).detach()
    for order in (
        ("fold-batch-norm", "sparsify{sparsity=0.5}"),
        ("sparsify{sparsity=0.5}", "fold-batch-norm"),
    ):
        pruned = Pipeline.parse(", ".join(order))(program)
        after = Calibrate(data=Data.of(x))(pruned).program
        errors = [float((run(p, p.target, x) - wanted).norm()) for p in (after, pruned)]
        assert errors[0] < 0.6 * errors[1]


def test_half_precision_stays_half_precision(x):
    net = nn.Conv2d(6, 8, 3).bfloat16()
    program = specqd.capture(net, (x.bfloat16(),))
    after = Pipeline.of(Sparsify(sparsity=0.5), Calibrate(data=Data.of(x.bfloat16())))(program)
    assert {w.dtype for w in after.weights.values()} == {torch.bfloat16}
    wanted = net(x.bfloat16()).float().detach()
    pruned = Sparsify(sparsity=0.5)(program).program
    errors = [float((run(p, p.target, x.bfloat16()).float() - wanted).norm()) for p in (after, pruned)]
    assert errors[0] < errors[1]


# Refusals and bad input


def test_what_is_left_alone_is_counted_by_reason(rng):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1)
            self.up, self.again = nn.ConvTranspose2d(8, 8, 2), nn.ConvTranspose2d(8, 8, 2)
            self.sums = nn.Parameter(torch.ones(8, 8, 1, 1))

        def forward(self, x):
            x = nn.functional.conv2d(self.again(self.up(self.first(x))), self.sums.cumsum(0))
            return self.last(x)

    x = torch.randn(4, 6, 5, 5, generator=rng)
    program = specqd.capture(Odd(), (x,))
    after = Pipeline.of(Sparsify(sparsity=0.5, ignore=("last.*",)), Calibrate(data=Data.of(x)))(program)
    left = "transposed convolutions are not pruned (2), its weight is computed, not stored (1)"
    pruned, calibrated = (dict(event.noted)[""] for event in after.history[-2:])
    total = "50.0% of the 48 weights of layers that can be pruned are zero"
    assert pruned == f"{total}; 4 left alone: {left}, last.weight is ignored (1)"
    assert calibrated == f"layers calibrated: 1; 4 left alone: {left}, last.weight was not sparsified (1)"
    assert f"  target: {calibrated}" in str(after)


def test_dense_layers_are_refused(program, x):
    result = Calibrate(data=Data.of(x))(program)
    assert result.rewrites == 0 and [r.why for r in result.refusals] == [
        f"{n}.weight was not sparsified" for n in (0, 2, 4, 8)
    ]


def test_inputs_that_are_not_finite_are_refused_and_the_rest_calibrated(sparse, x):
    sparse.weights["4.bias"] = torch.full_like(sparse.weights["4.bias"], torch.inf)
    result = Calibrate(data=Data.of(x))(sparse)
    assert ("linear", "its input is NaN or infinite on the calibration data") in [
        (r.node, r.why) for r in result.refusals
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("damping=-1", "calibrate: a damping of -1.0 cannot be used; give more than 0"),
        ("damping=nan", "a damping of nan"),
        ("steps=0", "calibrate: 0 steps are too few; give 1 or more"),
        ("method=sgd", r"option method: 'sgd' is not one of closed \| adam \| correct"),
        ("pixels=bytes", r"option pixels: 'bytes' is not one of imagenet \| unit \| signed"),
    ],
)
def test_an_option_out_of_range_is_an_error(options, why):
    with pytest.raises(InputError, match=why):
        Pipeline.parse(f"calibrate{{{options}}}")


def test_damping_is_chosen_by_what_was_left_out(net, x):
    """Of each layer, by a fifth of the batches, whose error is found here from rows instead of Gram matrices."""
    program = specqd.capture(net, (x[:4],))
    sparse = Sparsify(sparsity=0.6, allocation="uniform")(program).program
    after = Calibrate(data=Data.of(x))(sparse).program
    batches, chosen = x.split(4), set()

    def rows(layer, some):
        return torch.cat([rows_of(program, layer, batch) for batch in some], 1)

    for before, layer in zip(prunable(program, program.target), prunable(after, after.target), strict=True):
        dense, near = matrices(program, before), matrices(sparse, layer)
        support = near != 0
        support[..., -1] = layer.bias is not None
        fitted, unseen = rows(before, batches[:4] + batches[5:]), rows(before, batches[4:5])

        def solved(gram, damping):
            return solve(dense, corrected(dense, near, support, gram), support, gram, damping)  # noqa: B023

        errors = {
            damping: float((unseen @ (solved(fitted.mT @ fitted, damping) - dense).mT).square().sum())
            for damping in module._DAMPINGS
        }
        chosen.add(best := min(errors, key=errors.get))
        wanted = solved(sum(part.mT @ part for part in (fitted, unseen)), best)
        assert_close(matrices(after, layer)[support], wanted[support], rtol=1e-3, atol=1e-3)
    assert len(chosen) > 1, "all layers choose the same: this cannot tell them apart"

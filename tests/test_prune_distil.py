"""distil: the training against a loop over torch modules and hooks, and what it is for: errors that do not add up."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import specqd
from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.prune.augmentation import augmented
from specqd.passes.prune.calibrate import Calibrate
from specqd.passes.prune.calibration_data import Data
from specqd.passes.prune.distil import Distil
from specqd.passes.prune.sparsify import Sparsify
from specqd.reference import run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def x(rng):
    return torch.randn(32, 4, 8, 8, generator=rng)


@pytest.fixture
def net(rng):
    net = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.ReLU(),
        nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.3
    return net.eval()


@pytest.fixture
def program(net, x):
    return specqd.capture(net, (x[:8],), ({0: torch.export.Dim("batch", min=2, max=64)},))


@pytest.fixture
def sparse(program):
    return Sparsify(sparsity=0.6, allocation="uniform")(program).program


AT = (0, 2, 4, 8)


def test_it_is_adam_on_the_errors_of_all_layers_by_their_variance(net, sparse, x):
    """The same by torch's own modules, hooks and schedule, on the batches that the seed's permutation gives."""
    got = Distil(data=Data.of(x), epochs=3, rate=1e-3, augment=False, seed=5)(sparse).program.weights
    student, seen = copy.deepcopy(net), {}
    for name, parameter in student.named_parameters():
        parameter.data.copy_(sparse.weights[name])
    kept = {name: parameter != 0 for name, parameter in student.named_parameters()}
    for which, model in (("teacher", net), ("student", student)):
        for at in AT:
            model[at].register_forward_hook(lambda m, i, out, key=(which, at): seen.__setitem__(key, out))
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=6)
    for epoch in range(3):
        order = torch.randperm(32, generator=torch.Generator().manual_seed((5 << 32) + epoch))
        for chosen in order.split(16):
            with torch.no_grad():
                net(x[chosen])
            student(x[chosen])
            pairs = [(seen["student", at], seen["teacher", at]) for at in AT]
            loss = sum(((a - b) ** 2).mean() / ((b - b.mean()) ** 2).mean() for a, b in pairs) / 4
            optimiser.zero_grad()
            loss.backward()
            for name, parameter in student.named_parameters():
                if name.endswith("weight"):
                    parameter.grad[~kept[name]] = 0
            optimiser.step()
            schedule.step()
    for name, parameter in student.named_parameters():
        assert not torch.equal(got[name], sparse.weights[name])
        # Six steps of at most 1e-3: where a gradient is about zero, its rounding says which way Adam goes.
        assert_close(got[name], parameter.detach(), rtol=0, atol=1e-4)


def test_outputs_are_nearer_than_after_the_closed_form_and_zeros_stay(program, sparse, x):
    calibrated = Calibrate(data=Data.of(x))(sparse).program
    distilled = Distil(data=Data.of(x), epochs=20, rate=5e-3, augment=False)(calibrated).program
    wanted = run(program, program.target, x)
    errors = [float((run(p, p.target, x) - wanted).norm()) for p in (distilled, calibrated)]
    assert errors[0] < 0.7 * errors[1]
    for name in (f"{at}.weight" for at in AT):
        assert torch.equal(distilled.weights[name] == 0, sparse.weights[name] == 0)
    assert all(torch.equal(distilled.dense[name], program.weights[name]) for name in distilled.dense)


def test_a_second_run_and_a_calibration_change_nothing_until_more_is_pruned(sparse, x):
    first = Distil(data=Data.of(x), epochs=1)(sparse)
    assert first.rewrites == 4
    again, calibrated = (
        action(first.program) for action in (Distil(data=Data.of(x)), Calibrate(data=Data.of(x)))
    )
    assert again.rewrites == calibrated.rewrites == 0
    assert [r.why for r in again.refusals] == [f"{at}.weight is distilled already" for at in AT]
    assert [r.why for r in calibrated.refusals] == [f"{at}.weight is calibrated already" for at in AT]
    sparser = Sparsify(sparsity=0.8, allocation="uniform")(first.program).program
    assert Distil(data=Data.of(x), epochs=1)(sparser).rewrites == 4


def test_a_run_that_was_broken_off_goes_on(sparse, x, tmp_path, monkeypatch):
    def broken(what, done, of):
        if done == 5:
            raise KeyboardInterrupt

    action = Distil(data=Data.of(x), epochs=4)
    with pytest.raises(KeyboardInterrupt):
        action(sparse, tell=broken)
    told = []
    resumed = action(sparse, tell=lambda what, done, of: told.append((what, done, of)))
    assert told == [("distilling", done, 8) for done in (4, 5, 6, 7)]
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path / "another cache"))
    whole = action(sparse)
    assert whole.notes == resumed.notes
    for name, weight in whole.program.weights.items():
        assert torch.equal(weight, resumed.program.weights[name])


def test_augmented_images_are_others_in_the_same_range(rng):
    images = torch.randn(64, 3, 20, 24, generator=rng)
    first, second = (augmented(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == images.shape
    assert images.min() <= first.min() and first.max() <= images.max()
    assert ((first - images).abs().mean((1, 2, 3)) > 0.1).all()
    assert not torch.equal(first, augmented(images, torch.Generator().manual_seed(4)))


def test_a_single_colour_becomes_a_single_colour(rng):
    """Whatever is turned, scaled and mixed with itself; the range that it stays in is that of all its channels."""
    for seed in range(20):
        image = torch.rand(1, 3, 1, 1, generator=rng).expand(1, 3, 9, 9)
        got = augmented(image, torch.Generator().manual_seed(seed))
        assert_close(got, got[..., :1, :1].expand_as(got), rtol=1e-5, atol=1e-6)


def test_augmented_images_are_seen_in_training(sparse, x):
    plain, changed = (
        Distil(data=Data.of(x), epochs=1, augment=augment)(sparse).program for augment in (False, True)
    )
    assert not torch.equal(plain.weights["0.weight"], changed.weights["0.weight"])


def test_half_precision_stays_half_precision(net, x):
    program = specqd.capture(net.bfloat16(), (x.bfloat16(),))
    after = Pipeline.of(Sparsify(sparsity=0.5), Distil(data=Data.of(x.bfloat16()), epochs=2))(program)
    assert {weight.dtype for weight in after.weights.values()} == {torch.bfloat16}


def test_what_was_not_sparsified_is_refused_and_counted(program, x):
    result = Distil(data=Data.of(x))(program)
    assert result.rewrites == 0
    assert [r.why for r in result.refusals] == [f"{at}.weight was not sparsified" for at in AT]
    reasons = ", ".join(f"{at}.weight was not sparsified (1)" for at in AT)
    assert [n.what for n in result.notes] == [f"layers distilled: 0; 4 left alone: {reasons}"]


def test_a_rate_that_diverges_is_an_error(sparse, x):
    x = x.clone()
    sparse.weights["0.bias"] = torch.full_like(sparse.weights["0.bias"], math.inf)
    with pytest.raises(InputError, match=r"distil: weights became NaN or infinite; give a rate below 0.0003"):
        Distil(data=Data.of(x), epochs=1)(sparse)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("epochs=0", "distil: 0 epochs are too few; give 1 or more"),
        ("rate=0", "distil: a rate of 0.0 cannot be used; give more than 0"),
        ("rate=nan", "a rate of nan cannot be used"),
    ],
)
def test_an_option_out_of_range_is_an_error(options, why):
    with pytest.raises(InputError, match=why):
        Pipeline.parse(f"distil{{{options}}}")

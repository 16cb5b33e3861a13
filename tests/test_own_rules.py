"""Operators that torch does not take apart, or in a form that is not compiled, against eager torch."""

from itertools import product

import pytest
import torch
from against_eager import assert_as_eager
from torch import nn
from torch.nn import functional as F  # noqa: N812

from specqd.codegen.general.rules import OWN
from specqd.errors import CodegenError


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(tmp_path, rng, mode):
    """Empty bags at both ends, a bag of padding alone, and weights of their own."""
    table = torch.randn(7, 5, generator=rng)
    indices, offsets = torch.tensor([1, 3, 2, 6, 2, 2, 0]), torch.tensor([0, 0, 4, 6, 7])
    weights = torch.rand(7, generator=rng) if mode == "sum" else None

    def bags(table, indices, offsets):
        given = {"mode": mode, "per_sample_weights": weights, "padding_idx": 2}
        return (
            F.embedding_bag(indices, table, offsets, **given),
            F.embedding_bag(indices, table, offsets, include_last_offset=True, **given),
        )

    assert_as_eager(tmp_path, bags, table, indices, offsets)


def test_a_tensor_is_spread_to_its_mask(tmp_path, rng):
    x, source = torch.randn(5, generator=rng), torch.randn(25, generator=rng)
    mask = torch.rand(5, 5, generator=rng) > 0.5
    assert_as_eager(tmp_path, torch.masked_scatter, x, mask, source)


def test_a_loss_that_torch_computes_in_chunks(tmp_path, rng):
    x, linear = torch.randn(8, 6, generator=rng), torch.randn(4, 6, generator=rng)
    target = torch.tensor([0, 3, 1, 2, 2, 3, 1, 0])
    chunks = nn.LinearCrossEntropyOptions(allow_retain_graph=True)

    def loss(x, linear, target):
        return tuple(
            F.linear_cross_entropy(x, linear, target, reduction=reduction, ignore_index=2, options=chunks)
            for reduction in ("mean", "sum", "none")
        )

    assert_as_eager(tmp_path, loss, x, linear, target)


def test_windows_that_differ_and_ends_that_meet(tmp_path, rng):
    x = torch.randn(2, 3, 7, 8, generator=rng)
    x[0, 0, 3] = x[0, 0, 3, 0]  # which of equals is the largest is told by its place

    def windows(x):
        return (
            *F.adaptive_max_pool2d(x, (3, 4), return_indices=True),
            *F.adaptive_max_pool3d(x, (2, 7, 4), return_indices=True),
            *F.adaptive_max_pool1d(x[0], 2, return_indices=True),
            F.pad(x, (2, 3, -1, 2), mode="circular"),
            F.pad(x[0], (2, 3), mode="reflect"),
        )

    assert_as_eager(tmp_path, windows, x)


def test_products_of_three_and_distances(tmp_path, rng):
    a, b = torch.randn(4, 5, generator=rng), torch.randn(4, 3, generator=rng)
    weight, bias = torch.randn(2, 5, 3, generator=rng), torch.randn(2, generator=rng)

    def functions(a, b, weight, bias):
        distances = [F.pdist(a, p) for p in (0.0, 1.0, 2.0, 3.5, torch.inf)]
        return F.bilinear(a, b, weight, bias), *distances

    assert_as_eager(tmp_path, functions, a, b, weight, bias)


WAYS = tuple(product(("bilinear", "nearest"), ("zeros", "border", "reflection"), (True, False)))


@pytest.mark.parametrize("sizes", [(3, 4, 5), (4, 1, 5), (1, 2, 1)])
def test_places_in_volumes(rng, sizes):
    """Inside, on corners and outside, for each way to go on there."""
    x, grid = torch.randn(2, 3, *sizes, generator=rng), torch.randn(2, 2, 3, 4, 3, generator=rng) * 1.5
    grid[0, 0, 0] = torch.tensor([[1.0, -1, 0], [0.5, -0.5, 0.25], [-1, 1, 1], [0, 0, 0]])
    rule = OWN[torch.ops.aten.grid_sampler_3d.default]
    for mode, padding, corners in WAYS:
        numbers = ("bilinear", "nearest").index(mode), ("zeros", "border", "reflection").index(padding)
        wanted = F.grid_sample(x, grid, mode, padding, corners)
        torch.testing.assert_close(rule(x, grid, *numbers, corners), wanted, rtol=0, atol=1e-6)


def test_places_in_volumes_are_compiled(tmp_path, rng):
    x, grid = torch.randn(2, 3, 4, 2, 5, generator=rng), torch.randn(2, 2, 3, 4, 3, generator=rng) * 1.5

    def read(x, grid):
        return F.grid_sample(x, grid, "nearest", "reflection", False), F.grid_sample(
            x, grid, align_corners=True
        )

    assert_as_eager(tmp_path, read, x, grid)


def test_windows_at_random_places(tmp_path, rng):
    images, volumes = torch.randn(2, 3, 9, 11, generator=rng), torch.randn(3, 8, 9, 10, generator=rng)
    two, three = torch.rand(2, 3, 2, generator=rng), torch.rand(1, 3, 3, generator=rng)

    def pool(images, volumes, two, three):
        return (
            *F.fractional_max_pool2d(images, (2, 3), (4, 6), return_indices=True, _random_samples=two),
            *F.fractional_max_pool2d(images, 2, (1, 5), return_indices=True, _random_samples=two),
            *F.fractional_max_pool3d(volumes, 2, (4, 4, 5), return_indices=True, _random_samples=three),
        )

    assert_as_eager(tmp_path, pool, images, volumes, two, three)


def test_statistics_that_are_written_are_refused_as_that(tmp_path, rng):
    def norm(x, mean, variance):
        return F.instance_norm(x, mean, variance, use_input_stats=True)

    with pytest.raises(CodegenError, match="writes into an input"):
        assert_as_eager(tmp_path, norm, torch.randn(2, 3, 4, generator=rng), torch.zeros(3), torch.ones(3))

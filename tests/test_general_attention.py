"""The attention kernel of any module: against torch, with masks, tails, open sizes, and rows that see nothing."""

import pytest
import torch
from guarded import run_guarded
from torch import nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.testing import assert_close

import specqd
from specqd.codegen.isa import TABLE
from specqd.passes import Pipeline
from specqd.runtime.cpu import cpu_features

# Sums of up to 300 products in another order, and another exponential.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


class Many(nn.Module):
    """Attentions of every kind over the same tensors, `[2, 3, 17 or 40, 24]`."""

    def forward(self, q, k, v, added, hidden):
        return (
            attend(q, k, v),
            attend(q, k, v, added, scale=0.3),
            attend(q, k, v, hidden),
            attend(q, k, v, added[:, :1]),
            attend(k, k, v, is_causal=True),
            attend(q[..., :5], k[..., :5], v[..., :5]),
            attend(q.transpose(1, 2)[:, :3], k, v),
        )


def tensors(rng):
    q, k, v = (torch.randn(2, 3, n, 24, generator=rng) for n in (17, 40, 40))
    added = torch.randn(17, 40, generator=rng)
    added[3] = float("-inf")  # sees nothing
    added[4] = torch.finfo(torch.float32).min  # sees all alike
    added[5, 7:] = float("-inf")
    return q, k, v, added, torch.rand(2, 1, 17, 40, generator=rng) > 0.5


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.extended) for name in ("generic", "avx2")), "native"]
)
def test_each_kind_is_one_kernel_and_right(tmp_path, rng, name):
    if name in TABLE and not set(TABLE[name].features) <= cpu_features():
        pytest.skip(f"this CPU has no {name}")
    given = tensors(rng)
    manifest = specqd.compile(Many(), tmp_path / "many", example_inputs=given, isa=name)
    called = [kernel.function for kernel in manifest.module.kernels]
    assert sum(function.startswith("attention") for function in called) == 7
    assert not any(function.startswith(("multiply", "extreme")) for function in called)
    compiled = specqd.load(tmp_path / "many")
    for got, expected in zip(compiled(*given), Many()(*given), strict=True):
        assert_close(got, expected, **TOLERANCE)
    poisoned = (given[0].index_fill(2, torch.tensor([2]), float("nan")), *given[1:])
    for got, expected in zip(compiled(*poisoned), Many()(*poisoned), strict=True):
        assert_close(got, expected, equal_nan=True, **TOLERANCE)


class Masked(nn.Module):
    def forward(self, q, k, v, added, hidden):
        found = attend(q, k, v, added), attend(q, k, v, hidden), attend(k, k, v, is_causal=True)
        return torch.cat(found, 2)


def test_nothing_is_read_beyond_operands_and_masks(tmp_path, rng):
    # 44 keys are no whole blocks of columns.
    q, k, v, added = (
        torch.randn(2, 3, *size, generator=rng) for size in ((16, 24), (44, 24), (44, 24), (16, 44))
    )
    given = q, k, v, added[0, 0].clone(), torch.rand(2, 1, 16, 44, generator=rng) > 0.5
    manifest = specqd.compile(Masked(), tmp_path / "masked", example_inputs=given)
    assert sum(kernel.function.startswith("attention") for kernel in manifest.module.kernels) == 3
    found = torch.from_numpy(run_guarded(tmp_path / "masked", *given))
    assert_close(found, Masked()(*given), **TOLERANCE)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) * 0.25).masked_fill(~self.seen(length), float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))

    def seen(self, length):
        return torch.ones(length, length, dtype=torch.bool).tril()


def test_a_layer_that_is_written_out_runs_in_one_kernel_at_any_length(tmp_path, rng):
    layer, dynamic = Layer(), {0: Dim("batch", max=5), 1: Dim("length", max=400)}
    program = specqd.capture(layer, (torch.randn(2, 150, 32, generator=rng),), (dynamic,))
    fused = Pipeline.parse("fuse-attention")(program)
    manifest = specqd.compile(fused, tmp_path / "layer")
    assert [k.function for k in manifest.module.kernels].count("attention") == 1
    compiled = specqd.load(tmp_path / "layer")
    for batch, length in ((1, 1), (1, 7), (2, 128), (3, 129), (1, 300)):
        x = torch.randn(batch, length, 32, generator=rng)
        with torch.no_grad():
            assert_close(compiled(x), layer(x), **TOLERANCE)

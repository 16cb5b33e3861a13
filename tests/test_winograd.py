"""Winograd's convolution against torch in float64: at any size, as precise as direct sums, where it is used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compiled import RUNNABLE
from dense_cases import run_conv
from hypothesis import given, settings
from hypothesis import strategies as st

from specqd.codegen import dense_kernels
from specqd.codegen.dense_kernels import ConvSpec, Epilogue, by_winograd, pack_conv
from specqd.codegen.dense_kernels.layout import PATCH, POSITIONS

SPEC = ConvSpec(1, 32, 12, 13, 32, (3, 3), padding=(1, 1, 1, 1))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(4, 12), st.integers(4, 33)),
    channels=st.tuples(st.sampled_from([16, 17, 48, 176]), st.sampled_from([16, 40, 96, 112])),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    batch=st.integers(1, 2),
    epilogue=st.builds(Epilogue, st.booleans(), st.booleans(), st.sampled_from([None, "relu", "gelu"])),
    out=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_size_is_torchs(size, channels, padding, batch, epilogue, out) -> None:
    spec = ConvSpec(
        batch, channels[0], size[0] + 2, size[1] + 2, channels[1], (3, 3), padding=padding, epilogue=epilogue,
        out_dtype=out,
    )  # fmt: skip
    assert by_winograd(spec)
    run = run_conv(spec, RUNNABLE[0], torch.Generator().manual_seed(0))
    unit = 2**-8 * run.exact.abs() if out == "bfloat16" else 0.0
    assert ((run.out - run.exact).abs() <= 1e-5 * (1 + run.exact.abs().max()) + unit).all()


@pytest.mark.parametrize(("channels", "size"), [(32, 24), (256, 12)])
def test_rounding_does_no_more_harm_than_in_direct_sums(channels, size, monkeypatch) -> None:
    spec = replace(SPEC, in_channels=channels, height=size, width=size)

    def error() -> float:
        run = run_conv(spec, RUNNABLE[0], torch.Generator().manual_seed(1))
        return float((run.out - run.exact).square().mean().sqrt())

    fast = error()
    for module in (dense_kernels, dense_kernels.layout):
        monkeypatch.setattr(module, "by_winograd", lambda spec: False)
    assert fast <= 1.5 * error()


@pytest.mark.parametrize("place", [(6, 7), (5, 6), (0, 12)])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_no_number_spoils_the_outputs_that_direct_sums_have_of_it(place, value) -> None:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(1, 32, 12, 13, generator=rng)
    x[0, 5, place[0], place[1]] = value
    run = run_conv(SPEC, RUNNABLE[0], rng, x)
    fine = run.exact.isfinite()
    assert torch.equal(run.out.isfinite(), fine) and not fine.all()
    assert (run.out - run.exact).abs()[fine].max() < 1e-4


def test_a_transformed_weight_has_what_the_convolution_of_one_tile_needs() -> None:
    """The weight of position (0, 0) is the first tap, that of (1, 1) a quarter of all taps' sum."""
    weight = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(3))
    packed = torch.from_numpy(pack_conv(SPEC, weight.numpy())).reshape(PATCH, PATCH, 2, 32, 16)
    positions = packed.permute(0, 1, 2, 4, 3).reshape(POSITIONS, 32, 32)
    assert torch.equal(positions[0], weight[..., 0, 0])
    assert torch.equal(positions[-1], weight[..., 2, 2])
    assert torch.allclose(positions[5], weight.sum((2, 3)) / 4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": (3, 1)}, {"stride": (1, 2)}, {"dilation": (2, 2)}, {"groups": 2}, {"planes": True},
        {"dtype": "bfloat16"}, {"in_channels": 8}, {"height": 2},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_direct(change) -> None:
    assert by_winograd(SPEC) and not by_winograd(replace(SPEC, **change))

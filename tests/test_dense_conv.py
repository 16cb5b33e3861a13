"""Convolution kernels against torch in float64, on every instruction set that this CPU has, at awkward sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compiled import RUNNABLE
from dense_cases import SAMPLED_KINDS, Run, run_conv
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script.ir_builder import IRBuilder

from specqd.codegen.dense_kernels import ConvSpec, Epilogue, Requantise, conv2d, pack_conv
from specqd.codegen.dense_kernels.spec import ACTIVATIONS
from specqd.codegen.isa import TABLE
from specqd.errors import CodegenError, InputError

TYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
INTEGERS = [(x, out) for x in ("uint8", "int8") for out in ("int32", "float32", "uint8", "int8")]


def check(spec: ConvSpec, run: Run) -> None:
    """Integer sums are exact; sums of floats are within 1e-5 of the largest, and BF16 outputs half a unit more.

    An integer output is one off only where the real value is as good as half way between two.
    """
    assert run.out.shape == run.exact.shape
    error = (run.out - run.exact).abs()
    if spec.out_dtype == "int32":
        assert torch.equal(run.out, run.exact)
    elif spec.out_dtype in ("uint8", "int8"):
        scaled = run.real / spec.requantise.scale
        tie = ((scaled - scaled.floor()) - 0.5).abs() < 1e-3
        assert (error[~tie] == 0).all() and (error <= 1).all()
    else:
        unit = 2**-8 * run.exact.abs() if spec.out_dtype == "bfloat16" else 0.0
        assert (error <= 1e-5 * (1 + run.exact.abs().max()) + unit).all()


@st.composite
def convolutions(draw: Any) -> ConvSpec:
    """Small convolutions of any kind that a spec can say."""
    dtype, out_dtype = draw(st.sampled_from([*TYPES, *TYPES, *INTEGERS]))
    integer = dtype in ("uint8", "int8")
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (1, 4)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 3), (2, 1)]))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, reach[i % 2])) for i in range(4))
    height, width = (
        max(1, draw(st.sampled_from([1, 4, 7, 16, 19])), reach[i] - padding[i] - padding[i + 2])
        for i in (0, 1)
    )
    groups, inputs, outputs = draw(
        st.sampled_from(
            [(1, 3, 8), (1, 16, 16), (1, 24, 40), (1, 64, 32), (1, 80, 48), (1, 33, 17), (2, 128, 64), (5, 5, 5),
             (40, 40, 40), (24, 24, 48), (8, 32, 32), (3, 6, 21)]
        )
    )  # fmt: skip
    epilogue = Epilogue(draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([None, *ACTIVATIONS])))
    return ConvSpec(
        batch=draw(st.sampled_from([1, 1, 2])),
        in_channels=inputs,
        height=height,
        width=width,
        out_channels=outputs,
        kernel=kernel,
        stride=stride,
        padding=padding,  # type: ignore[arg-type]
        dilation=dilation,
        groups=groups,
        dtype=dtype,
        out_dtype=out_dtype,
        epilogue=Epilogue() if out_dtype == "int32" else epilogue,
        planes=groups == 1 and draw(st.booleans()),
        zero=draw(st.sampled_from([0, 7] if dtype == "int8" else [0, 128])) if integer else 0,
        requantise=Requantise(0.125, 3) if integer else Requantise(),
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(spec=convolutions(), isa=st.sampled_from(RUNNABLE))
def test_any_convolution_is_torchs(spec: ConvSpec, isa: str) -> None:
    check(spec, run_conv(spec, isa, torch.Generator().manual_seed(0)))


#: what each instruction set must get right: the cases of the register tiles, of tiles of AMX, and of lanes
CASES = {
    "pointwise": ConvSpec(1, 80, 7, 9, 48, epilogue=Epilogue(True, True, "relu")),
    "in passes": ConvSpec(1, 272, 3, 5, 32, (3, 3), padding=(1, 1, 1, 1)),
    "strided": ConvSpec(1, 32, 19, 21, 64, (3, 3), (2, 2), (0, 1, 2, 1)),
    "first layer": ConvSpec(1, 3, 33, 34, 16, (7, 7), (2, 2), (3, 3, 3, 3), planes=True),
    "depthwise": ConvSpec(1, 24, 15, 31, 24, (5, 5), padding=(2, 2, 2, 2), groups=24),
    "one pixel": ConvSpec(2, 40, 1, 1, 64),
    "winograd": ConvSpec(
        2, 40, 9, 14, 48, (3, 3), padding=(2, 0, 1, 2), epilogue=Epilogue(True, True, "relu")
    ),
}


@pytest.mark.parametrize(("isa", "dtype"), SAMPLED_KINDS)
def test_every_instruction_set(isa: str, dtype: str, rng: torch.Generator) -> None:
    names = list(CASES) if isa in ("amx", "avx512") else ["pointwise", "depthwise", "winograd"]
    for name in names:
        spec = replace(CASES[name], dtype=dtype, zero=5 if dtype == "uint8" else 0)
        check(spec, run_conv(spec, isa, rng))


@pytest.mark.parametrize("open_steps", [False, True])
def test_a_residual_has_a_scale_of_its_own(open_steps: bool, rng: torch.Generator) -> None:
    spec = replace(
        CASES["pointwise"], dtype="uint8", out_dtype="uint8", epilogue=Epilogue(True, True, "relu"),
        requantise=Requantise(0.0625, 3), summand=Requantise(0.02, 128), open_steps=open_steps,
    )  # fmt: skip
    check(spec, run_conv(spec, RUNNABLE[0], rng))


@pytest.mark.parametrize("isa", RUNNABLE)
def test_lanes_take_inputs_as_far_from_zero_as_there_are(isa: str, rng: torch.Generator) -> None:
    spec = ConvSpec(
        1, 24, 5, 9, 24, (3, 3), padding=(1, 1, 1, 1), groups=24, dtype="uint8", out_dtype="int32"
    )
    x = torch.randint(0, 2, (1, 24, 5, 9), generator=rng).float() * 255
    check(replace(spec, zero=255), run_conv(replace(spec, zero=255), isa, rng, x))
    signed = replace(spec, dtype="int8", zero=-128)
    check(signed, run_conv(signed, isa, rng, x - 128))


@pytest.mark.parametrize("channels", [24, 48])
def test_what_is_no_number_stays_in_its_group(channels: int, rng: torch.Generator) -> None:
    spec = ConvSpec(1, channels, 9, 11, 24, (3, 3), padding=(1, 1, 1, 1), groups=24)
    x = torch.randn(1, channels, 9, 11, generator=rng)
    x[0, 2, 3, 4], x[0, 9, 0, 0] = torch.nan, torch.inf
    run = run_conv(spec, RUNNABLE[0], rng, x)
    assert torch.equal(run.out.isnan(), run.exact.isnan()) and run.out.isnan().any()
    fine = run.exact.isfinite()
    assert (run.out[fine] - run.exact[fine]).abs().max() < 1e-4


BASE = ConvSpec(1, 8, 5, 5, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"height": 0}, "size below one"),
        ({"padding": (0, -1, 0, 0)}, "negative padding"),
        ({"groups": 3}, "cannot be split into 3 groups"),
        ({"kernel": (7, 1)}, r"a kernel of \(7, 1\) does not fit an image of 5 x 5"),
        ({"dtype": "float16"}, "no kernel makes float32 of float16"),
        ({"out_dtype": "int8"}, "no kernel makes int8 of float32"),
        ({"dtype": "int8", "out_dtype": "int32", "epilogue": Epilogue(bias=True)}, "take no bias"),
        ({"zero": 1}, "float32 inputs have no value 1"),
        ({"dtype": "bfloat16", "zero": 1}, "bfloat16 inputs have no value 1"),
        ({"dtype": "uint8", "zero": -1}, "uint8 inputs have no value -1"),
        ({"dtype": "int8", "zero": 128}, "int8 inputs have no value 128"),
        ({"dtype": "uint8", "out_dtype": "int8", "requantise": Requantise(0.0)}, "gives no int8 outputs"),
        (
            {"dtype": "uint8", "out_dtype": "uint8", "requantise": Requantise(1.0, 256)},
            "gives no uint8 outputs",
        ),
    ],
)
def test_specs_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(BASE, **change)


def test_unknown_activations_list_the_known() -> None:
    with pytest.raises(InputError, match="'swish'; known are relu, relu6"):
        Epilogue(activation="swish")


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"is \(8, 4, 1, 1\), and the convolution wants \(8, 8, 1, 1\)"):
        pack_conv(BASE, np.zeros((8, 4, 1, 1), np.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out_channels": 1 << 27}, "out has 3355443200 elements"),
        ({"padding": (40000,) * 4, "stride": (9000, 9000)}, "memory of a kernel has 102412800400 elements"),
    ],
)
def test_what_cannot_be_indexed_is_refused_and_leaves_no_builder_open(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(CodegenError, match=said):
        conv2d(replace(BASE, **change), TABLE["generic"])
    assert not IRBuilder.is_in_scope()


def test_planes_of_groups_are_refused() -> None:
    with pytest.raises(CodegenError, match="convert its input first"):
        conv2d(replace(BASE, groups=8, planes=True), TABLE["generic"])

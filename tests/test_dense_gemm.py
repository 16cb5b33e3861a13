"""Matrix kernels against torch in float64, at awkward sizes and with rows that are known when they are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import RUNNABLE
from dense_cases import KINDS, SAMPLED_KINDS, run_gemm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dense_conv import INTEGERS, TYPES, check

from specqd.codegen.dense_kernels import Epilogue, GemmSpec, Requantise
from specqd.codegen.dense_kernels.spec import ACTIVATIONS
from specqd.errors import InputError

OPEN = (1, 2, 13, 16, 31, 33, 150)


@st.composite
def products(draw: Any) -> GemmSpec:
    """Products with a weight, of any types."""
    dtype, out_dtype = draw(st.sampled_from([*TYPES, *INTEGERS]))
    epilogue = Epilogue(draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([None, *ACTIVATIONS])))
    return GemmSpec(
        m=draw(st.sampled_from([1, 3, 16, 37, 130])),
        n=draw(st.sampled_from([1, 16, 30, 48, 95])),
        k=draw(st.sampled_from([4, 64, 100, 292])),
        dtype=dtype,
        out_dtype=out_dtype,
        epilogue=Epilogue() if out_dtype == "int32" else epilogue,
        zero=9 if dtype in ("uint8", "int8") else 0,
        requantise=Requantise(0.125, 3),
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(spec=products(), isa=st.sampled_from(RUNNABLE))
def test_any_product_is_torchs(spec: GemmSpec, isa: str) -> None:
    (run,) = run_gemm(spec, isa, torch.Generator().manual_seed(0))
    check(spec, run)  # type: ignore[arg-type]


@pytest.mark.parametrize(("isa", "dtype"), SAMPLED_KINDS)
def test_rows_may_be_open(isa: str, dtype: str, rng: torch.Generator) -> None:
    out = "int32" if dtype == "uint8" else "float32"
    spec = GemmSpec(None, 40, 40, dtype=dtype, out_dtype=out)  # type: ignore[arg-type]
    runs = run_gemm(spec, isa, rng, OPEN)
    assert [len(run.out) for run in runs] == list(OPEN)
    for run in runs:
        check(spec, run)  # type: ignore[arg-type]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("isa", [isa for isa, dtype in KINDS if dtype == "float32"])
def test_products_of_two_activations(isa: str, transposed: bool, rng: torch.Generator) -> None:
    for m, n, k in ((19, 37, 33), (5, 32, 64)):
        spec = GemmSpec(m, n, k, 3, dynamic=True, transposed=transposed, epilogue=Epilogue(False, True, None))
        (run,) = run_gemm(spec, isa, rng)
        check(spec, run)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 0}, "size below one"),
        ({"dtype": "int8", "out_dtype": "int32", "k": 6}, "rows of 6 int8 are no whole words"),
        ({"batch": 2}, "products of two activations"),
        ({"dynamic": True, "dtype": "bfloat16"}, "products of two activations"),
    ],
)
def test_specs_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        replace(GemmSpec(4, 8, 8), **change)

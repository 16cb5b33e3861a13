"""Scalar functions of codegen, compiled in a vectorised loop and one by one, against float64 of the C library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compiled import RUNNABLE, array, jit
from tvm.script.ir_builder import IRBuilder

from specqd.codegen import maths
from specqd.codegen.isa import TABLE
from specqd.codegen.tir import I, tirx
from specqd.runtime.library import tensor

Oracle = Callable[[np.ndarray], np.ndarray]
Bound = Callable[[np.ndarray, np.ndarray, bool], np.ndarray]
Function = Callable[[np.ndarray], np.ndarray]

_erf, _erfc = (np.vectorize(f, otypes=[np.float64]) for f in (math.erf, math.erfc))

ORACLES: dict[str, Oracle] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "softplus": lambda x: np.where(x > 20, x, np.log1p(np.exp(x))),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "tanh": np.tanh,
    "erf": _erf,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * _erfc(-x * math.sqrt(0.5)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def _ulp(y: np.ndarray) -> np.ndarray:
    return np.spacing(np.abs(y).astype(np.float32)).astype(np.float64)


def _through_exp(x: np.ndarray, y: np.ndarray, fused: bool) -> np.ndarray:
    """The argument times log2(e) is rounded, so the error in units of the last place grows with it."""
    return _ulp(y) * (3 + np.abs(x) * (0.25 if fused else 1.4))


#: largest error allowed at (x, the exact value, whether the instruction set fuses multiply and add)
BOUNDS: dict[str, Bound] = {
    "exp": lambda x, y, fused: _through_exp(x, y, fused) + 1.3e-38,
    "expm1": lambda x, y, fused: (
        _through_exp(x, np.maximum(np.abs(y), 1), fused) * (np.abs(x) >= 0.5) + 2 * _ulp(y)
    ),
    "log": lambda x, y, fused: 2 * _ulp(y),
    "log1p": lambda x, y, fused: 3 * _ulp(y),
    "softplus": lambda x, y, fused: _through_exp(np.minimum(x, 0), y, fused) + 1.3e-38,
    "mish": lambda x, y, fused: _through_exp(np.minimum(x, 0), y, fused) + 2 * _ulp(y) + 2e-36,
    "tanh": lambda x, y, fused: 16 * _ulp(y),
    "erf": lambda x, y, fused: np.full_like(x, 5e-7),
    "sigmoid": lambda x, y, fused: _through_exp(np.minimum(x, 0), y, fused) + 1.3e-38,
    "silu": lambda x, y, fused: _through_exp(np.minimum(x, 0), y, fused) + 1e-36,
    "gelu": lambda x, y, fused: 5e-7 * np.abs(x) + 1e-45,
    "gelu_tanh": lambda x, y, fused: 1.5e-7 * np.abs(x) + 1e-45,
}

SPECIAL = [
    0.0,
    -0.0,
    87.3,
    -87.3,
    88.0,
    -88.0,
    88.3,
    -88.3,
    1e-45,
    -1e-45,
    1.2e-38,
    3.4e38,
    -3.4e38,
    -87.4,
    -89,
]
N = 1 << 17


def grid() -> np.ndarray:
    """2^17 float32: even steps in [-100, 100], magnitudes from the least subnormal to the largest float."""
    sizes = np.geomspace(1e-45, 3.4e38, 15000)
    steps = np.linspace(-100, 100, N - 2 * len(sizes) - len(SPECIAL))
    return np.concatenate([steps, sizes, -sizes, SPECIAL]).astype(np.float32)


def elementwise(name: str, count: int, lanes: int) -> Any:
    """TIR of one of the functions over float32[count], `lanes` at a time."""
    x, y = (tirx.decl_buffer((count,), "float32", n) for n in "xy")
    function = getattr(maths, name)
    with IRBuilder() as builder, I.serial(0, count // lanes) as s:
        if lanes == 1:
            I.buffer_store(y, function(x[s]), [s])
        else:
            with I.vectorized(0, lanes) as v:
                I.buffer_store(y, function(x[s * lanes + v]), [s * lanes + v])
    return tirx.PrimFunc([x, y], builder.get()).with_attr({"tirx.noalias": True})


@pytest.fixture(scope="module", params=RUNNABLE)
def functions(request: pytest.FixtureRequest) -> tuple[str, dict[str, Function], dict[str, Function]]:
    """The functions over a grid, and over a single float, by name."""
    isa = TABLE[request.param]
    code = {n: elementwise(n, N, isa.lanes) for n in ORACLES}
    code |= {f"{n}_one": elementwise(n, 1, 1) for n in ORACLES}
    code = {symbol: f.with_attr("global_symbol", symbol) for symbol, f in code.items()}
    library = jit(code, isa)

    def of(symbol: str, count: int) -> Function:
        given, result = array((count,), "float32"), array((count,), "float32")
        arguments = tensor(given), tensor(result)

        def call(x: np.ndarray) -> np.ndarray:
            given[:] = x
            library[symbol](*arguments)
            return result.copy()

        return call

    return isa.name, {n: of(n, N) for n in ORACLES}, {n: of(f"{n}_one", 1) for n in ORACLES}


Functions = tuple[str, dict[str, Function], dict[str, Function]]


@pytest.mark.parametrize("name", ORACLES)
def test_errors_are_within_the_bounds(name: str, functions: Functions) -> None:
    isa, vectors, _ = functions
    x = grid()
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        exact = ORACLES[name](wide)
        # Beyond 88.37 a result overflows a little early; that is the next test's matter.
        inside = (wide < 88.37) if name in ("exp", "expm1") else np.isfinite(exact)
        error = np.abs(vectors[name](x) - exact)
        bound = BOUNDS[name](wide, exact, isa != "generic")
    worst = np.argmax(np.where(inside, error - bound, -np.inf))
    assert error[worst] <= bound[worst], (
        f"{name}({x[worst]}) is off by {error[worst]:.2e} of {exact[worst]:.8g}"
    )


def test_every_number_keeps_its_range(functions: Functions) -> None:
    vectors = functions[1]
    x = grid()
    assert np.isinf(vectors["exp"](x)[x > 88.5]).all() and (vectors["exp"](x) > 0).all()
    assert (np.abs(vectors["tanh"](x)) <= 1).all() and (np.abs(vectors["erf"](x)) <= 1).all()
    assert (vectors["sigmoid"](x) >= 0).all() and (vectors["sigmoid"](x) <= 1).all()
    huge = np.abs(x) > 1e30
    for name in ("silu", "gelu", "gelu_tanh"):
        assert np.array_equal(vectors[name](x)[huge], np.maximum(x[huge], 0)), name


@pytest.mark.parametrize(
    ("name", "at_infinity", "at_minus_infinity"),
    [
        ("exp", np.inf, 0.0),
        ("expm1", np.inf, -1.0),
        ("log", np.inf, np.nan),
        ("log1p", np.inf, np.nan),
        ("softplus", np.inf, 0.0),
        ("tanh", 1.0, -1.0),
        ("erf", 1.0, -1.0),
        ("sigmoid", 1.0, 0.0),
        ("silu", np.inf, np.nan),  # as torch: -inf * 0
        ("gelu", np.inf, np.nan),
        ("gelu_tanh", np.inf, np.nan),
    ],
)
def test_infinities_and_nan(
    name: str, at_infinity: float, at_minus_infinity: float, functions: Functions
) -> None:
    for kind in functions[1:]:
        got = [float(kind[name](np.float32(x))[0]) for x in (np.inf, -np.inf, np.nan)]
        assert got == pytest.approx([at_infinity, at_minus_infinity, np.nan], rel=0, abs=1.3e-38, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp", 1),
        ("tanh", 0),
        ("erf", 0),
        ("sigmoid", 0.5),
        ("silu", 0),
        ("gelu", 0),
        ("expm1", 0),
        ("log", -np.inf),
        ("log1p", 0),
        ("mish", 0),
    ],
)
def test_zero_is_exact(name: str, value: float, functions: Functions) -> None:
    for zero in (0.0, -0.0):
        assert functions[1][name](np.float32(zero))[0] == value


@pytest.mark.parametrize("name", ORACLES)
def test_every_lane_gives_the_bits_of_a_scalar(name: str, functions: Functions) -> None:
    _, vectors, scalars = functions
    x = grid()
    bits = vectors[name](x).view(np.int32)
    for lane in range(1, 16):
        assert np.array_equal(np.roll(vectors[name](np.roll(x, lane)).view(np.int32), -lane), bits)
    picked = np.unique([*range(0, N, 97), *range(N - 64, N)])
    one_by_one = np.concatenate([scalars[name](x[i : i + 1]) for i in picked])
    assert np.array_equal(one_by_one.view(np.int32), bits[picked])

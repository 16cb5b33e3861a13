"""Compiled INT8 and BF16 against the same graphs in eager torch, and how codes reach the kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import specqd
from specqd.build import compile_model
from specqd.codegen.general.codes import move_codes
from specqd.codegen.general.decompose import decompose
from specqd.codegen.general.lower import lower
from specqd.codegen.general.table import RULES
from specqd.codegen.isa import named
from specqd.passes import Pipeline
from specqd.passes.prune.calibration_data import Data
from specqd.passes.quantize.quantize_int8 import QuantizeINT8
from specqd.reference import run
from specqd.runtime.cpu import cpu_features


class Residual(nn.Module):
    """Two branches of convolutions that meet, then one that goes around another."""

    def __init__(self):
        super().__init__()
        self.main, self.beside = nn.Conv2d(16, 40, 3, padding=1, stride=2), nn.Conv2d(16, 40, 1, stride=2)
        self.next = nn.Conv2d(40, 40, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.main(x) + self.beside(x))
        return torch.relu(x + self.next(x)).mean((2, 3))


class Gated(nn.Module):
    """Depthwise, squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.deep, self.gate, self.end = (
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 16, 1),
            nn.Conv2d(16, 24, 1),
        )

    def forward(self, x):
        x = nn.functional.hardswish(self.deep(x))
        return self.end(x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))


class Joined(nn.Module):
    """A concatenation of two scales of an image."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(32, 4, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        up = nn.functional.interpolate(self.b(nn.functional.max_pool2d(x, 2)), scale_factor=2.0)
        return self.c(torch.cat([up, x], 1))


def _images(net: nn.Module, channels: int) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), net), (
        2,
        3,
        20,
        20,
    )


CASES = {
    "residual": lambda: _images(Residual(), 16),
    "gated": lambda: _images(Gated(), 16),
    "joined": lambda: _images(Joined(), 8),
    "one dimension": lambda: (
        nn.Sequential(
            nn.Conv1d(4, 16, 5, stride=2), nn.GELU(), nn.Conv1d(16, 16, 3), nn.SiLU(), nn.Flatten(1)
        ),
        (2, 4, 41),
    ),
    "linears": lambda: (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), (3, 20, 64)),
}


def made(case: str, precision: str, rng: torch.Generator):
    torch.manual_seed(0)
    module, shape = CASES[case]()
    x = torch.randn(shape, generator=rng)
    program = specqd.capture(module.eval().requires_grad_(False), (x,))
    if precision == "int8":
        return module, x, QuantizeINT8(data=Data.of(x))(program).program
    return module, x, Pipeline.parse("cast-bf16")(program)


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        *((case, "int8") for case in CASES),
        ("residual", "bf16"),
        *(pytest.param(case, "bf16", marks=pytest.mark.extended) for case in CASES if case != "residual"),
    ],
)
def test_compiled_code_is_what_the_graph_says(case, precision, rng, tmp_path):
    module, x, program = made(case, precision, rng)
    compile_model(program, tmp_path / "made", pipeline="")
    found = specqd.load(tmp_path / "made")(x)
    wanted = run(program, program.target, x)
    # Sums of float32 are added in another order: a value between two codes may become the other one.
    assert (found - wanted).norm() < 2e-3 * wanted.norm()
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert (wanted - module(x)).norm() < 0.05 * module(x).norm()


def kernels(program) -> list[tuple[str, str]]:
    """The kernels that compiled code calls, in order, with the dtype that each gives."""
    module = lower(program, program.target, named("native", cpu_features())).module
    bindings = [binding for block in module["main"].body.blocks for binding in block.bindings]
    calls = [binding.value for binding in bindings if "call_tir" in str(getattr(binding.value, "op", ""))]
    return [(str(call.args[0].name_hint).rstrip("0123456789"), str(call.ty_args[0].dtype)) for call in calls]


def test_activations_stay_in_blocks_of_codes(rng):
    assert kernels(made("residual", "int8", rng)[2]) == [
        ("elementwise", "uint8"), ("convolve", "uint8"), ("extreme", "uint8"), ("convolve", "uint8"),
        ("convolve", "uint8"), ("convolve", "uint8"), ("sum", "float32"),
        *[("elementwise", "float32")] * 2,
    ]  # fmt: skip


def test_codes_move_through_views_and_pools(rng):
    _, _, program = made("joined", "int8", rng)
    graph = decompose(program, program.target, RULES).graph
    move_codes(graph)
    pool = next(n for n in graph.nodes if "max_pool" in str(n.target))
    join = next(n for n in graph.nodes if "cat" in str(n.target))
    assert {n.meta["val"].dtype for n in (pool.args[0], *join.args[0])} == {torch.uint8}


quantized = torch.ops.quantized_decomposed


class Narrow(nn.Module):
    """A product whose codes end below those of their type, as some quantisers leave it for kernels that saturate."""

    def __init__(self, rng: torch.Generator):
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (64, 64), generator=rng).to(torch.int8))
        self.register_buffer("scales", torch.rand(64, generator=rng) / 100)

    def forward(self, x):
        weight = quantized.dequantize_per_channel(self.weight, self.scales, None, 0, -127, 127, torch.int8)
        return self.pair(nn.functional.linear(self.pair(x, 0.05, 60, 127), weight), 0.1, 50, 127)

    def pair(self, x, scale, zero, most):
        how = scale, zero, 0, most, torch.uint8
        return quantized.dequantize_per_tensor(quantized.quantize_per_tensor(x, *how), *how)


def test_codes_end_where_their_quantiser_says(rng, tmp_path):
    module, x = Narrow(rng), torch.randn(64, 64, generator=rng)
    wanted = module(x)
    assert (wanted == (127 - 50) * torch.tensor(0.1)).any()
    specqd.compile(module, tmp_path / "made", example_inputs=(x,))
    # A sum between two codes may become the other one.
    assert (specqd.load(tmp_path / "made")(x) - wanted).abs().max() <= 0.1001


def test_a_product_of_mixed_codes_is_one_of_float32(rng, tmp_path):
    # Only the weight has codes: the input was left in float32.
    x = torch.randn(3, 64, generator=rng)
    program = specqd.capture(nn.Linear(64, 64).eval().requires_grad_(False), (x,))
    result = QuantizeINT8(data=Data.of(x), bias_correction=False)(program).program
    (product,) = [n for n in result.target.graph.nodes if "linear" in str(n.target)]
    product.update_arg(0, result.target.graph.find_nodes(op="placeholder")[0])
    compile_model(result, tmp_path / "made", pipeline="")
    torch.testing.assert_close(
        specqd.load(tmp_path / "made")(x), run(result, result.target, x), rtol=1e-4, atol=1e-5
    )


def test_a_process_of_its_own_may_use_tiles(rng, tmp_path):
    # Linux has to be asked for AMX's registers: a process that has compiled nothing has not asked yet.
    x = torch.randn(64, 64, generator=rng)
    program = specqd.capture(nn.Linear(64, 64).eval().requires_grad_(False), (x,))
    compile_model(QuantizeINT8(data=Data.of(x))(program).program, tmp_path / "made", pipeline="")
    script = (
        "import sys, numpy, specqd\n"
        "print(specqd.load(sys.argv[1])(numpy.zeros((64, 64), numpy.float32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "made"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "(64, 64)\n")

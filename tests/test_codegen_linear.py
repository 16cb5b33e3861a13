"""Matrix kernels against exact models of their arithmetic, at every row count and at awkward sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from compiled import EXTENDED, NATIVE, RUNNABLE, Compiled
from torch import Tensor, fx

import specqd.ops  # noqa: F401  (registers the operators)
from specqd.passes.quantize import int8, mxfp4
from specqd.program import Entry, ModelInfo, Program

aten, ops = torch.ops.aten, torch.ops.specqd
VOCAB = 33
#: rows of a pass; the default run has tiles of every kind: alone and after others, evenly cut and with a rest
ROWS = [
    rows if rows in (1, 2, 3, 5, 6, 7, 16, 17, 33) else pytest.param(rows, marks=EXTENDED)
    for rows in (*range(1, 18), 33)
]
GROUP = 32


@dataclass(frozen=True)
class Case:
    """One product: `weight [n, k]` stored as `kind`, of inputs that are rows of a table of its own."""

    kind: str
    n: int
    k: int
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.n}x{self.k}{'-bias' if self.bias else ''}"


#: one product of each kind, for every row count
PLAIN = [Case("bf16", 40, 64), Case("f32", 24, 33, bias=True), Case("mxfp4", 40, 64), Case("int8", 40, 70)]
AWKWARD = [
    Case("bf16", 7, 34, bias=True),
    Case("bf16", 33, 31),  # pairs need an even k: computed in float32
    Case("bf16", 80, 2),
    Case("f32", 17, 1),
    Case("mxfp4", 5, 32, bias=True),
    Case("mxfp4", 81, 96),
    Case("int8", 3, 1),
    Case("int8", 50, 31, bias=True),
]


def products(cases: list[Case], rng: torch.Generator) -> Program:
    """A program whose logits are all products, one after another."""
    graph, weights, parts = fx.Graph(), {}, []
    tokens, _ = graph.placeholder("tokens"), graph.placeholder("positions")

    def stored(name: str, value: Tensor) -> fx.Node:
        weights[name] = value
        return graph.create_node("get_attr", name, name=name.replace(".", "_"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    for i, case in enumerate(cases):
        # Levels that differ by block and row tell scales apart; a row of zeros has a scale of its own.
        levels = 2.0 ** torch.randint(-9, 9, (VOCAB, 1 + case.k // GROUP), generator=rng)
        table = normal(VOCAB, case.k) * levels.repeat_interleave(GROUP, 1)[:, : case.k]
        table[3] = 0
        x = graph.call_function(aten.embedding.default, (stored(f"{i}.table", table), tokens))
        weight = (normal(case.n, case.k) * 2.0 ** torch.randint(-3, 3, (case.n, 1), generator=rng)).bfloat16()
        bias = stored(f"{i}.bias", normal(case.n)) if case.bias else None
        if case.kind == "mxfp4":
            given = [stored(f"{i}.{n}", t) for n, t in zip("ws", mxfp4.encode(weight), strict=True)]
            parts.append(graph.call_function(ops.linear_mxfp4.default, (x, *given, bias)))
        elif case.kind == "int8":
            given = [stored(f"{i}.{n}", t) for n, t in zip("ws", int8.encode(weight), strict=True)]
            parts.append(graph.call_function(ops.linear_int8.default, (x, *given, bias)))
        else:
            w = stored(
                f"{i}.w", weight if case.kind == "bf16" else weight.float() + 1e-3 * normal(case.n, case.k)
            )
            parts.append(graph.call_function(aten.linear.default, (x, w, bias) if bias else (x, w)))
    graph.output(graph.call_function(aten.cat.default, (parts, -1)))
    return Program({"target": Entry("target", graph)}, weights, ModelInfo("products", VOCAB, 64))


def split(logits: np.ndarray, cases: list[Case]) -> list[np.ndarray]:
    return np.split(logits, np.cumsum([c.n for c in cases])[:-1], axis=-1)


def fused_sum(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`x [rows, k] @ w.T` float32 as one chain of fused multiply-adds over k.

    A float64 holds the product of two float32 exactly, so a step rounds once but for ties of ties, which the
    fixed inputs here do not hit.
    """
    acc = np.zeros((len(x), len(w)), np.float32)
    for k in range(x.shape[1]):
        acc = (x[:, None, k].astype(np.float64) * w[None, :, k] + acc).astype(np.float32)
    return acc


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """INT8 values `[rows, groups, 32]` and float32 scales `[rows, groups]`, rounded as the kernels round."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
    largest = np.abs(blocks).max(-1)
    inverse = np.where(largest > 0, np.float32(127) / np.maximum(largest, np.float32(1e-30)), np.float32(0))
    return np.rint(blocks * inverse[..., None]).astype(np.int64), largest * np.float32(1 / 127)


def integer_model(x: np.ndarray, values: np.ndarray, scales: np.ndarray | None, unit: float) -> np.ndarray:
    """Exact integer sums a block of 32, and a chain of fused multiply-adds over the blocks."""
    q, x_scales = quantised(x)
    blocks = np.pad(values, ((0, 0), (0, -values.shape[1] % GROUP))).reshape(len(values), -1, GROUP)
    acc = np.zeros((len(x), len(values)), np.float32)
    for g in range(q.shape[1]):
        total = (q[:, g] @ blocks[:, g].T.astype(np.int64)).astype(np.float32)
        factor = (x_scales[:, g] * np.float32(unit))[:, None] * (1 if scales is None else scales[None, :, g])
        acc = (total.astype(np.float64) * factor + acc).astype(np.float32)
    return acc


def model(case: Case, i: int, weights: dict[str, Tensor], tokens: list[int]) -> np.ndarray:
    """What a CPU with fused multiply-add must give, bit for bit."""
    x = weights[f"{i}.table"][tokens].numpy()
    stored = weights[f"{i}.w"]
    if case.kind == "mxfp4":
        scales = weights[f"{i}.s"]
        doubled = mxfp4.decode(stored, torch.full_like(scales, 127)) * 2
        result = integer_model(x, doubled.numpy(), 2.0 ** (scales.numpy().astype(np.float32) - 127), 0.5)
    elif case.kind == "int8":
        result = integer_model(x, stored.numpy(), None, 1.0) * weights[f"{i}.s"].numpy()
    else:
        result = fused_sum(x, stored.float().numpy())
    return result + weights[f"{i}.bias"].numpy() if case.bias else result


def room(case: Case, i: int, weights: dict[str, Tensor], tokens: list[int]) -> np.ndarray:
    """Largest rounding error of k products and sums, without knowing their order: `k u sum |x w|`."""
    x = weights[f"{i}.table"][tokens].double().abs()
    if case.kind == "mxfp4":
        w = mxfp4.decode(weights[f"{i}.w"], weights[f"{i}.s"])
    elif case.kind == "int8":
        w = int8.decode(weights[f"{i}.w"], weights[f"{i}.s"])
    else:
        w = weights[f"{i}.w"]
    total = (x @ w.double().abs().T + (weights[f"{i}.bias"].abs() if case.bias else 0)).numpy()
    return (case.k + 8) * 2.0**-23 * total


class Products:
    """Compiled products of one instruction set."""

    def __init__(self, isa: str, cases: list[Case]) -> None:
        self.isa, self.cases = isa, cases
        self.program = products(cases, torch.Generator().manual_seed(1))
        self.compiled = Compiled(self.program, isa)
        self.one_by_one = split(self.compiled.decode("target", list(range(VOCAB)), 1), cases)

    def rows(self, tokens: list[int]) -> list[np.ndarray]:
        return split(self.compiled.feed("target", tokens, 0), self.cases)


@pytest.fixture(scope="module", params=RUNNABLE)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(isa: str) -> Products:
    return Products(isa, PLAIN)


@pytest.fixture(scope="module")
def awkward(isa: str) -> Products:
    return Products(isa, AWKWARD)


def check(products: Products, tokens: list[int], got: list[np.ndarray]) -> None:
    for i, (case, y) in enumerate(zip(products.cases, got, strict=True)):
        wanted = model(case, i, products.program.weights, tokens)
        if products.isa == "generic":
            assert (np.abs(y - wanted) <= room(case, i, products.program.weights, tokens)).all(), case
        elif products.isa in ("avx2", "avx512") or case.kind != "bf16":
            assert np.array_equal(y, wanted), f"{case}: {np.abs(y - wanted).max():.2e} off"
        else:  # VDPBF16PS rounds activations to BF16 and both its operands' subnormals to zero
            loose = room(case, i, products.program.weights, tokens) / 2.0**-23 / (case.k + 8) * 2.0**-8
            assert (np.abs(y - wanted) <= loose).all(), case


def test_one_row_is_the_model(plain: Products, awkward: Products) -> None:
    for made in (plain, awkward):
        check(made, list(range(VOCAB)), made.one_by_one)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_have_the_bits_of_one_row(rows: int, plain: Products) -> None:
    if plain.isa != NATIVE.name and rows != 5:
        pytest.skip(f"row counts are tried with {NATIVE.name} only, to save time")
    tokens = [(7 * i + rows) % VOCAB for i in range(rows)]
    for case, got, one in zip(plain.cases, plain.rows(tokens), plain.one_by_one, strict=True):
        assert np.array_equal(got, one[tokens]), case


@pytest.mark.parametrize("rows", [3, pytest.param(16, marks=EXTENDED)])
def test_awkward_sizes_have_the_bits_of_one_row(rows: int, awkward: Products) -> None:
    if awkward.isa != NATIVE.name:
        pytest.skip(f"row counts are tried with {NATIVE.name} only, to save time")
    tokens = [(5 * i + 2) % VOCAB for i in range(rows)]
    for case, got, one in zip(awkward.cases, awkward.rows(tokens), awkward.one_by_one, strict=True):
        assert np.array_equal(got, one[tokens]), case


def test_the_model_is_the_reference_within_the_rounding_of_activations(plain: Products) -> None:
    from specqd.reference import run

    tokens = list(range(VOCAB))
    wanted = split(run(plain.program, plain.program.target, torch.tensor([tokens]))[0].numpy(), plain.cases)
    for i, (case, y) in enumerate(zip(plain.cases, wanted, strict=True)):
        got = model(case, i, plain.program.weights, tokens)
        # An INT8 activation is off by at most half of amax / 127 of its block, over 64 of them at random.
        tolerance = 0.02 if case.kind in ("mxfp4", "int8") else 1e-5
        assert np.abs(got - y).max() <= tolerance * np.abs(y).max(), case


def test_extreme_values_do_not_saturate(isa: str) -> None:
    """+-127 everywhere against the largest weights: AVX2 sums some of these in 16 bits."""
    cases = [Case("mxfp4", 16, 64), Case("int8", 16, 64)]
    rng = torch.Generator().manual_seed(2)
    program = products(cases, rng)
    weights = program.weights
    for i in (0, 1):
        weights[f"{i}.table"] = torch.randint(0, 2, (VOCAB, 64), generator=rng) * 254.0 - 127
        weights[f"{i}.table"][:2] = torch.tensor([[127.0], [-127.0]])
    weights["0.w"] = torch.randint(0, 2, (16, 32), generator=rng).to(torch.uint8) * 0x88 + 0x77
    weights["0.w"][:2] = torch.tensor([[0x77], [0xFF]], dtype=torch.uint8)
    weights["0.s"][:] = 127
    weights["1.w"][:2] = torch.tensor([[127], [-127]], dtype=torch.int8)
    weights["1.s"][:] = 1.0
    tokens = list(range(VOCAB))
    for i, y in enumerate(split(Compiled(program, isa).decode("target", tokens, 1), cases)):
        w = mxfp4.decode(weights["0.w"], weights["0.s"]) if i == 0 else weights["1.w"]
        exact = weights[f"{i}.table"].double() @ w.double().T
        assert np.abs(exact.numpy()).max() == (127 * 64 * 6, 127 * 64 * 127)[i]
        assert np.allclose(y, exact, rtol=2e-7, atol=0.25), cases[i]

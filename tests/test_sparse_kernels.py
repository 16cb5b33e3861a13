"""Matrices without their zeros: what is stored, what is chosen, and that no format changes a bit of a product."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from compiled import EXTENDED, NATIVE, RUNNABLE, Compiled, llama, lowered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from specqd.codegen.isa import TABLE
from specqd.codegen.sparse_kernels import FORMATS, PRECISIONS, Format, choose
from specqd.codegen.sparse_kernels.formats import PADDING, Stored
from specqd.passes import Pipeline
from specqd.passes.quantize import int8, mxfp4
from specqd.program import Entry, ModelInfo, Program

aten, ops = torch.ops.aten, torch.ops.specqd
VOCAB = 33
EXPANDING = [
    name if name == NATIVE.name else pytest.param(name, marks=EXTENDED)
    for name in RUNNABLE
    if TABLE[name].expands
]


def with_zeros(weight: Tensor, pattern: str, share: float, rng: torch.Generator) -> Tensor:
    """Zeros anywhere, in two of four neighbours, or in blocks of RxC."""
    n, k = weight.shape
    if pattern == "2:4":
        order = torch.rand(n, k // 4, 4, generator=rng).argsort(-1)
        return weight.masked_fill((order < 2).reshape(n, k), 0)
    rows, columns = map(int, pattern.split("x"))
    blocks = torch.rand(-(-n // rows), -(-k // columns), generator=rng) < share
    return weight.masked_fill(blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k], 0)


def expanded(matrix: Stored, form: Format, shape: tuple[int, ...], paired: bool) -> np.ndarray:
    """Read vectors back one by one, as the definition has it."""
    blocks, count, channels, inputs = shape
    unit = {"element": lambda c, i: c * inputs + i, "lane": lambda c, i: c, "column": lambda c, i: i}[
        form.name
    ]
    result = np.zeros(shape, matrix.values.dtype)
    for b in range(blocks):
        at = longest = int(matrix.starts[b])
        for v in range(count):
            mask, low = int(matrix.masks[b, v]), not paired or v % 2 == 0
            at = place = max(at, longest) if low else at
            for c, i in np.ndindex(channels, inputs):
                if mask >> unit(c, i) & 1:
                    value = matrix.values[place]
                    result[b, v, c, i] = (value & 15 if low else value >> 4) if paired else value
                    place += 1
            longest = max(longest, place)
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(FORMATS), st.sampled_from(list(PRECISIONS)), st.floats(0, 1))
def test_what_is_stored_expands_to_the_vectors(seed: int, form: Format, kind: str, share: float) -> None:
    precision, rng = PRECISIONS[kind], np.random.default_rng(seed)
    shape = (2, 4, 16, precision.inputs)
    dtype = np.uint8 if precision.paired else np.dtype(f"int{precision.bits}")
    top = 16 if precision.paired else 127
    vectors = np.where(rng.random(shape) < share, 0, rng.integers(1, top, shape)).astype(dtype)
    made = Stored(vectors, form, precision.paired)
    assert np.array_equal(expanded(made, form, shape, precision.paired), vectors)
    assert len(made.values) == made.size
    assert made.masks.dtype.itemsize == form.mask_bytes(precision.inputs)
    assert not made.values[-PADDING:].any()


@dataclass(frozen=True)
class Case:
    """One product whose weight [n, k] has zeros in a pattern, for which a format must be chosen."""

    kind: str
    pattern: str
    form: str | None
    n: int = 40
    k: int = 96
    share: float = 0.6


CASES = [
    Case("int8", "1x1", "element", k=70),
    Case("int8", "1x4", "lane"),
    Case("int8", "16x1", "column", n=48),
    Case("mxfp4", "2:4", "element"),
    Case("bf16", "1x1", "element", n=7, k=34),
    Case("bf16", "1x1", "element", k=32),
    Case("f32", "1x1", "element", k=33),
]


def program_of(cases: list[Case], rng: torch.Generator) -> Program:
    """A program whose logits are all products, one after another."""
    graph, weights, parts = fx.Graph(), {}, []
    tokens, _ = graph.placeholder("tokens"), graph.placeholder("positions")

    def stored_as(name: str, value: Tensor) -> fx.Node:
        weights[name] = value
        return graph.create_node("get_attr", name, name=name.replace(".", "_"))

    for i, case in enumerate(cases):
        table = torch.randn(VOCAB, case.k, generator=rng)
        x = graph.call_function(aten.embedding.default, (stored_as(f"{i}.table", table), tokens))
        weight = with_zeros(torch.randn(case.n, case.k, generator=rng), case.pattern, case.share, rng)
        if case.kind in ("int8", "mxfp4"):
            encoded = (int8 if case.kind == "int8" else mxfp4).encode(weight)
            given = [stored_as(f"{i}.{n}", t) for n, t in zip("ws", encoded, strict=True)]
            target = getattr(ops, f"linear_{case.kind}").default
            parts.append(graph.call_function(target, (x, *given, None)))
        else:
            w = stored_as(f"{i}.w", weight.bfloat16() if case.kind == "bf16" else weight)
            parts.append(graph.call_function(aten.linear.default, (x, w)))
    graph.output(graph.call_function(aten.cat.default, (parts, -1)))
    return Program({"target": Entry("target", graph)}, weights, ModelInfo("products", VOCAB, 64))


@pytest.fixture(scope="module", params=EXPANDING)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(CASES, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dense(isa: str, program: Program) -> np.ndarray:
    """What the dense kernels give, row by row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TABLE[isa], "expands", False)
        return Compiled(program, isa).decode("target", list(range(VOCAB)), 1)


def test_each_pattern_has_its_format(isa: str, program: Program) -> None:
    forms = [p.packed.form for p in lowered(program, "target", 1, TABLE[isa]).parameters if p.packed]
    for i, case in enumerate(CASES):
        choice = choose([program.weights[f"{i}.w"]], case.kind, TABLE[isa])
        assert (choice.form and choice.form.name) == case.form, (case, choice)
        assert (f"{case.kind}-{case.form}-values" in forms) == (case.form is not None)


@pytest.mark.parametrize("rows", [1, 5, *(pytest.param(rows, marks=EXTENDED) for rows in (17, 33))])
def test_no_format_changes_a_bit(rows: int, isa: str, program: Program, dense: np.ndarray) -> None:
    tokens = [(7 * i + rows) % VOCAB for i in range(rows)]
    got = Compiled(program, isa).decode("target", tokens, rows)
    ends = np.cumsum([case.n for case in CASES])[:-1]
    parts = zip(CASES, np.split(got, ends, 1), np.split(dense[tokens], ends, 1), strict=True)
    for case, of_sparse, of_dense in parts:
        assert np.array_equal(of_sparse.view(np.int32), of_dense.view(np.int32)), case


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.skipif(not NATIVE.expands, reason="this CPU has no instruction that expands vectors")
def test_layers_of_a_loop_may_have_any_number_of_zeros_each() -> None:
    program = Pipeline.parse("target: sparsify{sparsity=0.6,allocation=global}")(llama())
    forms = {p.packed.form: p.packed for p in lowered(program, "target", 2).parameters if p.packed}
    assert len(forms["bf16-element-values"].sources) == 2
    got = Compiled(program).feed("target", [5, 80], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NATIVE, "expands", False)
        assert np.array_equal(got, Compiled(program).feed("target", [5, 80], 0))


def test_a_table_that_is_looked_up_too_stays_dense(rng: torch.Generator) -> None:
    table = with_zeros(torch.randn(VOCAB, 64, generator=rng), "1x1", 0.7, rng).bfloat16()
    graph = fx.Graph()
    tokens, _ = graph.placeholder("tokens"), graph.placeholder("positions")
    weight = graph.create_node("get_attr", "table")
    x = graph.call_function(aten.embedding.default, (weight, tokens))
    graph.output(graph.call_function(aten.linear.default, (x, weight)))
    program = Program({"target": Entry("target", graph)}, {"table": table}, ModelInfo("tied", VOCAB, 64))
    assert [p.packed.form for p in lowered(program, "target", 1).parameters if p.packed] == ["bf16"]


@pytest.mark.parametrize(
    ("kind", "share", "isa", "why"),
    [
        (
            "mxfp4",
            0.25,
            "amx",
            r"^no gain on this CPU: with 2\d% zeros 1\d\d% of the dense bytes would be read",
        ),
        ("int8", 0.6, "avx2", r"^avx2 has no instruction that expands vectors$"),
        ("int8", 0.1, "avx2", "^$"),
        ("int8", 0.6, "amx", "^$"),
    ],
)
def test_zeros_that_are_stored_have_a_reason(
    kind: str, share: float, isa: str, why: str, rng: torch.Generator
) -> None:
    weight = with_zeros(1 + torch.rand(64, 64, generator=rng), "1x1", share, rng)
    values, _ = (int8 if kind == "int8" else mxfp4).encode(weight)
    choice = choose([values], kind, TABLE[isa])
    assert re.search(why, choice.why), choice
    assert (choice.form is None) == (share < 0.2 or bool(choice.why))


def test_a_weight_is_counted_for_each_precision_by_itself(rng: torch.Generator) -> None:
    weight = with_zeros(1 + torch.rand(64, 64, generator=rng), "1x1", 0.5, rng).bfloat16()
    alone = {kind: choose([weight.clone()], kind, TABLE["amx"]) for kind in ("f32", "bf16")}
    assert alone["f32"].sizes != alone["bf16"].sizes
    assert {kind: choose([weight], kind, TABLE["amx"]) for kind in alone} == alone

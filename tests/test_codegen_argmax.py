"""The greedy choice of compiled rows, and how sure it is, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled import NATIVE, RUNNABLE, array, jit, threads
from tvm.script.ir_builder import IRBuilder

from specqd.codegen.isa import TABLE
from specqd.codegen.kernels.argmax import argmax
from specqd.codegen.lower.step import Step
from specqd.codegen.tir import I, tirx
from specqd.runtime.library import tensor
from specqd.runtime.output import Output

ROWS = 3


def compiled(logits: np.ndarray, isa: str) -> Output:
    """Run the kernel over float32 `[ROWS, vocab]`."""
    rows, vocab = logits.shape
    step = Step(TABLE[isa], rows)
    sizes = [("logits", "float32", rows * vocab), ("next", "int32", rows), ("sums", "float32", rows * 2)]
    sizes += [("best", "float32", rows * 16), ("where", "int32", rows * 16), ("parts", "float32", rows * 32)]
    with IRBuilder() as builder, I.attr(0, "pragma_parallel_launch_point", 1):
        given, chosen, sums, *scratch = (
            step.parameter(name, "scratch", dtype, (n,)) for name, dtype, n in sizes
        )
        argmax(TABLE[isa], rows, vocab, given, chosen, sums, tuple(scratch), step.phase)
    buffers = [p.buffer for p in step.parameters.values()]
    function = tirx.PrimFunc(buffers, builder.get()).with_attr({"global_symbol": "f", "tirx.noalias": True})
    arrays = {name: array((n,), dtype) for name, dtype, n in sizes}
    for one in arrays.values():
        one.view(np.uint8)[:] = 0xFF
    arrays["logits"][:] = logits.ravel()
    with threads(2):
        jit({"f": function}, TABLE[isa])["f"](*map(tensor, arrays.values()))
    return Output(arrays["next"], logits, arrays["sums"].reshape(rows, 2), vocab)


LOGITS = {
    "usual": lambda rng, n: rng.normal(0, 3, (ROWS, n)),
    "all equal": lambda rng, n: np.full((ROWS, n), -7.5),
    "one certain": lambda rng, n: np.where(np.arange(n) == n - 1, 500.0, rng.normal(size=(ROWS, n))),
    "some excluded": lambda rng, n: np.where(
        rng.random((ROWS, n)) < 0.5, -np.inf, rng.normal(size=(ROWS, n))
    ),
    "far apart": lambda rng, n: rng.normal(0, 1e4, (ROWS, n)),
}


@pytest.mark.parametrize("isa", dict.fromkeys([NATIVE.name, RUNNABLE[-1]]))
@pytest.mark.parametrize("vocab", [5, 83, 1000, 4097])
@pytest.mark.parametrize("kind", LOGITS)
def test_choice_probability_and_entropy(kind: str, vocab: int, isa: str, rng: torch.Generator) -> None:
    logits = LOGITS[kind](np.random.default_rng(rng.initial_seed()), vocab).astype(np.float32)
    logits[:, 0] = np.maximum(logits[:, 0], -1e4)  # a row with nothing but -inf says nothing
    got = compiled(logits, isa)
    exact = torch.softmax(torch.from_numpy(logits).double(), -1)
    assert [got.token(row) for row in range(ROWS)] == logits.argmax(-1).tolist()
    for row in range(ROWS):
        probability, entropy = got.confidence(row)
        assert probability == pytest.approx(float(exact[row].max()), rel=2e-6)
        assert entropy == pytest.approx(float(torch.special.entr(exact[row]).sum()), rel=2e-5, abs=2e-6)


def test_rows_of_another_vocabulary_are_seen_in_the_targets() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 9.0]], np.float32)
    padded = Output(np.array([3]), logits, None, 3)
    assert padded.token(0) == 1 and padded.row(0).tolist() == [1, 3, 2]
    smaller = Output(np.array([3]), logits, None, 6)
    assert smaller.token(0) == 3 and smaller.row(0).tolist() == [1, 3, 2, 9, -np.inf, -np.inf]
    assert np.isnan(smaller.confidence(0)).all()

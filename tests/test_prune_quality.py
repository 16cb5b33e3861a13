"""The cases that measure what pruning costs: each is a pipeline, and none comes twice."""

import importlib
from pathlib import Path

import pytest

from specqd.passes import Pipeline

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("kind", ["of_images", "of_language"])
def test_every_case_is_a_pipeline_of_its_own(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases = list(getattr(importlib.import_module("prune_cases"), kind)([0.5, 0.65], [0, 1]))
    assert len(set(cases)) == len(cases)
    told = [(c.pruning(f"data=random,seed={c.seed}"), c.data, c.precision, c.seed) for c in cases]
    assert len(set(told)) == len(told)
    for (text, *_), case in zip(told, cases, strict=True):
        shares = [
            step.action.sparsity for step in Pipeline.parse(text).steps if step.action.name == "sparsify"
        ]
        assert case.method == "dense" or case.pattern != "any" or shares[-1] == case.sparsity

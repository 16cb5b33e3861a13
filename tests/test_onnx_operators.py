"""Node tests of the onnx package, in the eager torch of the Program that each becomes.

benchmarks/coverage.py --suite onnx-node compiles them.
"""

import re
from pathlib import Path

import pytest

from specqd.errors import SpecqdError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = 10
#: why a node may be refused
REASONS = "random|depends on the data|sequences|optional|STRING|training|files of images|TreeEnsemble"


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("part", range(PARTS))
def test_node_tests(part, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import coverage_onnx

    names = coverage_onnx.names()[part::PARTS]
    found = {name: coverage_onnx.attempt(name, coverage_onnx.interpreted, (SpecqdError,)) for name in names}
    failed = {
        name: why
        for name, (outcome, why) in found.items()
        if outcome != "passed" and not (outcome == "refused" and re.search(REASONS, why))
    }
    assert not failed
    assert len(names) > 100

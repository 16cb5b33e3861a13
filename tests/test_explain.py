import subprocess
import sys

import torch
from small_modules import of as module
from small_programs import DIM, Decoder, of
from torch import nn

from specqd.explanation import explain
from specqd.passes import Pass
from specqd.passes.rules import Rule, apply


def body(m, x, _):
    s = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    y = m.w * (x * s)
    return m.down(torch.relu(m.up(y)) * m.gate(y)) + torch.rsqrt(y * y + 1)


def program():
    parts = {"up": nn.Linear(DIM, 40), "gate": nn.Linear(DIM, 40), "down": nn.Linear(40, DIM)}
    return of(Decoder(body, w=torch.ones(DIM), **parts))


PIPELINE = "fuse-rms-norm, fuse-linear, derive-draft, draft: cast-mxfp4, draft: share-kv"


def test_every_node_has_a_story():
    report = explain(program(), PIPELINE)

    def notes(node, entry="target"):
        return [note for story in report.of(entry, node) for note in story.notes]

    for node in ("pow_1", "mean", "add", "rsqrt", "mul", "mul_1"):
        assert notes(node) == [("fuse-rms-norm", "taken into rms_norm")]
    assert notes("rsqrt_1") == [("fuse-rms-norm", "refused: it is not taken of a mean plus a number")]
    assert notes("linear") == [("fuse-linear", "taken into slice_1")]
    assert notes("rms_norm") == [("fuse-rms-norm", "made")]
    assert notes("relu") == [] and notes("relu", "draft") == []
    assert notes("linear_2", "draft") == [
        ("draft: cast-mxfp4", "refused: its input has 40 channels, not a multiple of 32")
    ]
    assert notes("output", "draft") == [
        ("draft: share-kv", "refused: draft has no cache to share; put insert-kv-cache first")
    ]
    ever = {n.name for n in program().target.graph.nodes if n.op == "call_function"}
    assert ever <= {story.node for story in report.stories}


def test_a_node_that_its_pass_made_and_then_refused_has_a_story():
    class KeepsAbs(Pass):
        """Replace relu by abs, and refuse to drop that."""

        name = "keeps-abs-in-a-test"

        def run(self, program, entry):
            like = (torch.empty(2, 3),)
            dropped = Rule(lambda x: torch.abs(x), lambda x: x, like, lambda x: "it stays")
            yield from apply(
                program, entry, (Rule(lambda x: torch.relu(x), lambda x: torch.abs(x), like), dropped)
            )

    try:
        report = explain(module(lambda m, x: torch.relu(x) + 1, torch.ones(2, 3)), KeepsAbs())
    finally:
        del Pass.registry["keeps-abs-in-a-test"]
    step = "keeps-abs-in-a-test"
    (made,) = (story for story in report.stories if story.operator == "aten.abs")
    assert made.notes == [(step, "made"), (step, "refused: it stays")]


def test_the_report_can_be_read():
    text = str(explain(program(), PIPELINE))
    assert "fuse-rms-norm on target: 1 rewrites, 1 refusals, 17 -> 12 nodes" in text
    assert "1 x aten.pow in the model -- fuse-rms-norm: taken into rms_norm (first: pow_1)" in text
    assert "draft: nodes that no pass touched (copied from target)" in text
    assert text.endswith("chain: target <- draft")


def test_explaining_leaves_the_program_alone():
    given = program()
    before = str(given.target.graph)
    explain(given, PIPELINE)
    assert str(given.target.graph) == before and not given.history


def test_the_function_is_not_hidden_by_a_module_of_its_name() -> None:
    code = "import specqd; specqd.explain; specqd.capture; specqd.compile; specqd.load; assert callable(specqd.explain)"
    names = (
        "import specqd, specqd.explanation; assert all(callable(getattr(specqd, n)) for n in specqd.__all__)"
    )
    for text in (code, names):
        subprocess.run([sys.executable, "-c", text], check=True)

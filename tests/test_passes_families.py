"""The passes on every decoder family: the logits stay, and each graph becomes what codegen wants."""

from functools import cache

import pytest
import torch
from family_configs import FAMILIES, VOCAB, random_model
from torch.testing import assert_close

from specqd.frontends.huggingface import capture
from specqd.passes import Pipeline
from specqd.passes.watchers import verify
from specqd.program import Program
from specqd.reference import new_caches, run

pytestmark = pytest.mark.slow

PIPELINE = (
    "insert-kv-cache{dtype=float32}, fuse-rms-norm, fuse-rope, conv1d-to-linear, fuse-linear, derive-draft, "
    "draft: cast-mxfp4, draft: share-kv"
)
TOKENS = torch.arange(17)[None] * 5 % VOCAB

# Rotations that rope does not express: a family, and the reason that must be given.
INTERLEAVED = {"cohere", "cohere2"}
# No rotation (learned positions) and no RMSNorm.
UNROTATED = {"gpt2", "opt"}


@cache
def captured(family: str) -> Program:
    return capture(random_model(FAMILIES[family]()))


@cache
def rewritten(family: str) -> Program:
    # Sums of float32 in another order: a few 1e-6 on logits whose deviation is near 1.
    return Pipeline.parse(PIPELINE)(captured(family), verify(TOKENS, rtol=1e-5, atol=2e-5))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_a_cache_fed_in_pieces_gives_them_too(family):
    program, caches = rewritten(family), new_caches(rewritten(family))
    pieces, at = [], 0
    for rows in (1, 3, 1, 5, 2, 4, 1):
        where = torch.arange(at, at + rows)[None]
        pieces.append(run(program, program.target, TOKENS[:, at : at + rows], where, caches=caches))
        at += rows
    expected = run(captured(family), captured(family).target, TOKENS)
    assert_close(torch.cat(pieces, 1), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_becomes_the_operators_that_codegen_wants(family):
    program = rewritten(family)
    targets = [str(getattr(n.target, "overloadpacket", "")) for n in program.target.graph.nodes]
    steps = {e.step: e for e in program.history if e.entry == "target"}
    assert "specqd.causal_attention" not in targets and "aten.rsqrt" not in targets
    assert "aten.addmm" not in targets
    reasons = {why for _, why in steps["fuse-rope"].refused}
    if family in INTERLEAVED:
        assert reasons == {"it rotates neighbouring channels, not halves (interleaved layout)"}
    else:
        assert not reasons
        assert ("specqd.rope" in targets) == (family not in UNROTATED)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_is_idempotent(family):
    program = rewritten(family)
    for step in Pipeline.parse(PIPELINE).steps:
        for entry in step.entries(program):
            assert step.action(program, entry).rewrites == 0

"""Prefix sharing in real compiled code: the bits are those of sequences that share nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accounting import demand_every_block
from test_join import small

import specqd
from specqd.codegen import library
from specqd.manifest import BLOCK
from specqd.passes.speculate.join import join
from specqd.runtime.batch import Batch
from specqd.runtime.sampling import Sampling

pytestmark = pytest.mark.slow

CONTEXT, VOCAB = 72, 61
PIPELINE = (
    f"fuse-rms-norm, fuse-rope, fuse-linear, insert-kv-cache{{capacity={CONTEXT}}}, "
    "derive-draft{entry=a}, a: cast-mxfp4{scale=search}, a: share-kv, c: cast-int8"
)
PLANS = ["target", "target <- a@fixed:3", "target <- c@fixed:3", "target <- a@fixed:2 <- c@fixed:2"]
SAMPLINGS = [None, Sampling(0.9, top_k=20, seed=5), Sampling(0.0, repetition_penalty=1.3)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft on its cache, and a joined one with a cache of its own."""
    joined = join(small(2, vocab=VOCAB), small(1, vocab=VOCAB), "c")
    joined.model = replace(joined.model, eos_token_ids=())
    target = tmp_path_factory.mktemp("compiled") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "VERIFY_ROWS", (1, 4))
        patch.setattr(library, "PREFILL_ROWS", ())
        specqd.compile(joined, target, pipeline=PIPELINE)
    return target


def text(seed: int, length: int) -> list[int]:
    return [(seed * 17 + i * i) % VOCAB for i in range(length)]


def test_answers_scores_and_drafts_are_those_without_sharing(artifact: Path):
    sharing, apart = specqd.load(artifact, 1), specqd.load(artifact, 1, prefix_sharing=False)
    prompts = [text(0, 37), text(0, 37), text(0, 32), text(0, 21) + text(1, 20), text(0, 41)]
    for sampling in SAMPLINGS:
        for i, prompt in enumerate(prompts):
            for plan in PLANS:
                one, other = (
                    m.generate(prompt, 24, plan=plan, sampling=sampling, logprobs=4) for m in (sharing, apart)
                )
                assert one.tokens == other.tokens
                assert one.logprobs == other.logprobs
                assert one.stats.accepted == other.stats.accepted
                assert one.stats.reused_tokens > 0 or (i, plan, sampling) == (0, "target", None)
                assert other.stats.reused_tokens == 0
                demand_every_block(sharing.engine.tables)


@pytest.mark.parametrize("blocks", [5, 9, 30])
def test_many_requests_over_a_small_pool(artifact: Path, blocks: int):
    """Some are cancelled on the way, and one who asks beside the batch is served too where there is room."""
    crowd = specqd.load(artifact, 1, sequences=4, cache_tokens=blocks * BLOCK)
    apart = specqd.load(artifact, 1, prefix_sharing=False)
    batch, tables = Batch(crowd.engine), crowd.engine.tables
    asked = {}
    for i in range(40):
        prompt = text(i % 3, 12 + i % 5 * 9) + text(i, i % 7)
        options = {"plan": PLANS[i % 4], "sampling": SAMPLINGS[i // 4 % 3]}
        request = crowd.request(prompt, 6 + i % 4 * 5, **options)
        asked[request] = apart.generate(prompt, 6 + i % 4 * 5, **options).tokens
        batch.add(request)
    given = {request: [] for request in asked}
    leaving = list(asked)[5::9]
    steps = 0
    while len(batch):
        for request, new in batch.step():
            given[request] += new
            assert given[request] == asked[request][: len(given[request])]
        steps += 1
        if steps % 25 == 0 and leaving:
            batch.cancel(gone := leaving.pop())
            asked[gone] = given[gone]
        demand_every_block(tables)
    assert given == asked
    assert all(request.error is None for request in asked)
    assert tables.available == tables.pool
    assert sum(request.answer.stats.reused_tokens for request in asked) > 100

"""The search for layers that can go: what it measures, against drafting token by token; what it predicts and finds."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from compiled import EXTENDED
from family_configs import FAMILIES, random_model
from test_passes_skip_layers import LAYERS, PIPELINE, VOCAB, model
from torch import Tensor
from torch.testing import assert_close

from specqd.frontends import capture
from specqd.passes import Pipeline
from specqd.passes.speculate.layer_search import Found, predicted_speedup, search
from specqd.passes.speculate.replay import Replay
from specqd.passes.speculate.residual import residual_blocks
from specqd.passes.speculate.skip_layers import SkipLayers
from specqd.program import Program
from specqd.reference import new_caches, run


@pytest.fixture(scope="module")
def program() -> Program:
    """A draft in MXFP4; layers 2 and 4 add next to nothing to what flows through them."""
    made = model()
    for layer in (2, 4):
        for matrix in (made.model.layers[layer].self_attn.o_proj, made.model.layers[layer].mlp.down_proj):
            torch.nn.init.constant_(matrix.weight, 1e-6)
    return Pipeline.parse(f"{PIPELINE}, draft: cast-mxfp4")(capture(made))


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (2, 19, 7, 30, 25, 40)]


def finished(steps: Generator[Any, None, Found]) -> Found:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def drafted(program: Program, text: list[int], shares: bool) -> Tensor:
    """Logits of the draft, fed one token at a time after the target, or alone."""
    rows, draft, caches = [], program.entries["draft"], new_caches(program)
    for place, token in enumerate(text):
        at = torch.tensor([[place]])
        held = {name: cache.clone() for name, cache in caches.items()} if shares else caches
        rows.append(run(program, draft, torch.tensor([[token]]), at, held)[0, 0])
        run(program, program.target, torch.tensor([[token]]), at, caches=caches)
    return torch.stack(rows)


@pytest.mark.parametrize("shares", [True, False])
def test_a_replay_is_what_a_draft_says_after_each_token(
    program: Program, texts: list[list[int]], shares: bool
):
    """Sums of float32 in another order: 1e-4 on logits near 1."""
    program = Pipeline.parse("draft: share-kv")(program) if shares else program
    target = Replay(program, program.target, texts)
    expected = [run(program, program.target, torch.tensor([text]))[0] for text in texts]
    assert_close(target.logits(), torch.cat(expected), rtol=1e-4, atol=1e-4)
    draft = Replay(program, program.entries["draft"], texts, target.held)
    expected = [drafted(program, text, shares) for text in texts]
    assert_close(draft.logits(), torch.cat(expected), rtol=1e-4, atol=1e-4)


#: the families tried in the default run: layers of two kinds, side by side, with tables of positions, of experts
SAMPLED = ("llama", "gemma2", "phi", "gpt2", "opt", "mixtral")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [name if name in SAMPLED else pytest.param(name, marks=EXTENDED) for name in FAMILIES]
)
def test_every_family_falls_into_its_layers(family: str):
    """Run one by one, they give the logits of the whole: float32 sums in another order."""
    config = FAMILIES[family]()
    made = Pipeline.parse("insert-kv-cache{dtype=float32}, fuse-rms-norm, fuse-rope, derive-draft")(
        capture(random_model(config))
    )
    tokens = [(7 * i + 1) % config.vocab_size for i in range(13)]
    blocks = residual_blocks(made.target)
    assert len(blocks.layers) == config.num_hidden_layers
    replay = Replay(made, made.target, [tokens])
    hidden = replay.before(blocks)
    for block in blocks.layers:
        hidden = replay.layer(block, hidden)
    expected = run(made, made.target, torch.tensor([tokens]))[0]
    assert_close(replay.after(blocks, hidden), expected, rtol=1e-4, atol=1e-4)
    shorter = SkipLayers(layers=("1",))(made, "draft")
    assert shorter.rewrites == 1
    assert run(shorter.program, shorter.program.entries["draft"], torch.tensor([tokens])).isfinite().all()


@pytest.mark.parametrize(
    ("agreement", "cost"), [(0.0, 0.1), (0.3, 0.4), (0.8, 0.28), (0.95, 0.1), (1.0, 0.3)]
)
def test_the_predicted_speedup_is_that_of_the_best_length(agreement: float, cost: float):
    """Counted: a round of g drafts gives i + 1 tokens if just the first i of them stand."""
    lengths = []
    for g in range(1, 16):
        stands = [agreement**i * (1 - agreement if i < g else 1) for i in range(g + 1)]
        tokens = sum(chance * (i + 1) for i, chance in enumerate(stands))
        lengths.append(tokens / (g * cost + 1 + 0.04 * g))
    assert predicted_speedup(agreement, cost) == pytest.approx(max(1.0, *lengths), rel=1e-12)


def test_what_it_finds_is_what_trying_shows(program: Program, texts: list[list[int]]):
    """The useless layers go; the agreement is that of the shortened draft on the half that was not searched on."""
    found = finished(search(program, program.entries["draft"], texts, 0.01))
    assert {2, 4} <= set(found.layers) < set(range(LAYERS))
    shorter = SkipLayers(layers=tuple(map(str, found.layers)))(program, "draft").program
    right = []
    for text in texts[1::2]:
        wanted = run(shorter, shorter.target, torch.tensor([text]))[0].argmax(-1)
        right.append((drafted(shorter, text, False).argmax(-1) == wanted)[1:])
    agreement = torch.cat(right).double().mean().item()
    named = ", ".join(map(str, found.layers))
    assert found.figures.startswith(f"without {named}, {agreement:.3f} of its choices are the target's")


def test_one_text_is_enough(program: Program, texts: list[list[int]]):
    whole = [token for text in texts for token in text]
    assert {2, 4} <= set(finished(search(program, program.entries["draft"], [whole], 0.01)).layers)


def test_the_pass_leaves_out_what_it_finds(program: Program):
    told: list[tuple[str, int, int]] = []
    result = SkipLayers(tokens=160)(program, "draft", lambda *what: told.append(what))
    assert result.refusals == ()
    assert result.rewrites >= 2
    assert told[0] == ("writing a text to calibrate on", 0, 160)
    assert ("trying drafts without 1 layers", 0, LAYERS) in told
    assert told[-1][0].startswith("without ")


def test_nothing_is_left_out_that_gains_too_little(program: Program, texts: list[list[int]]):
    found = finished(search(program, program.entries["draft"], texts, 5.0))
    assert found.layers == []
    assert found.figures.startswith("no layer can go for a gain of 500.0%: with all, ")
    assert "; without " in found.figures
    result = SkipLayers(gain=5.0, tokens=160)(program, "draft")
    assert result.rewrites == 0
    assert "the best to go, " in result.refusals[0].why

"""skip-layers: what is left of the graph, what it computes, where its keys go, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compiled import EXTENDED, Compiled, random_tokens
from small_programs import Decoder, of, ops
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from specqd.codegen.lower import function
from specqd.errors import InputError
from specqd.frontends import capture
from specqd.passes import Pipeline
from specqd.passes.speculate.residual import residual_blocks
from specqd.passes.speculate.skip_layers import SkipLayers
from specqd.program import Program
from specqd.reference import new_caches, run

LAYERS, VOCAB = 6, 61
PIPELINE = "fuse-rms-norm, fuse-rope, fuse-linear, insert-kv-cache{capacity=48,dtype=float32}, derive-draft"


def model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return made


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(model())


@pytest.fixture(scope="module")
def program(captured: Program) -> Program:
    return Pipeline.parse(PIPELINE)(captured)


def short(program: Program, layers: str) -> Program:
    return Pipeline.parse(f"draft: skip-layers{{layers={layers}}}")(program)


def planes(program: Program, entry: str) -> list[int]:
    """Cache layers that an entry's attentions use, in order."""
    nodes = program.entries[entry].graph.nodes
    return [int(n.args[7]) for n in nodes if "cached_attention" in str(n.target)]


@pytest.mark.parametrize("step", ["conv1d-to-linear", "fuse-rms-norm, fuse-rope", PIPELINE])
def test_layers_are_found_at_any_stage(captured: Program, step: str):
    blocks = residual_blocks(Pipeline.parse(step)(captured).target)
    assert len(blocks.layers) == LAYERS
    for one, following in zip(blocks.layers, blocks.layers[1:], strict=False):
        assert one.end is following.start
    assert len({tuple(str(n.target) for n in block.nodes) for block in blocks.layers}) == 1
    assert blocks.before[-1] is blocks.layers[0].start


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        ("0", [1, 2, 3, 4, 5]),
        ("5", [0, 1, 2, 3, 4]),
        ("1|3", [0, 2, 4, 5]),
        ("2-4", [0, 1, 5]),
        ("4|0-1|1", [2, 3, 5]),
        ("0-4", [5]),
    ],
)
def test_the_draft_computes_what_the_model_without_those_layers_does(
    captured: Program, program: Program, layers: str, left: list[int], rng
):
    """Transformers' model with the layers deleted; sums of float32 in another order, 1e-4 on logits near 1."""
    other = model().float()
    other.model.layers = nn.ModuleList(other.model.layers[i] for i in left)
    tokens = torch.randint(0, VOCAB, (1, 17), generator=rng)
    made = short(program, layers)
    with torch.no_grad():
        expected = other(tokens, use_cache=False).logits
    assert_close(run(made, made.entries["draft"], tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(made, made.target, tokens), run(program, program.target, tokens))
    assert planes(made, "draft") == left
    without_cache = short(Pipeline.parse("derive-draft")(captured), layers)
    assert_close(run(without_cache, without_cache.entries["draft"], tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["draft: share-kv, {}", "{}, draft: share-kv"])
def test_the_targets_cache_is_shared_layer_by_layer(program: Program, order: str, rng):
    made = Pipeline.parse(order.format("draft: skip-layers{layers=1|4}"))(program)
    assert set(made.caches) == {"kv"}
    caches = new_caches(made)
    run(made, made.entries["draft"], torch.randint(0, VOCAB, (1, 5), generator=rng), caches=caches)
    written = caches["kv_k"].flatten(1).any(1)
    assert written.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("layers", ["0|3", *(pytest.param(n, marks=EXTENDED) for n in ("1-4", "3", "1|2|4"))])
def test_compiled_layers_are_one_loop_over_uneven_places(
    program: Program, layers: str, rng, monkeypatch: pytest.MonkeyPatch
):
    """The bits of layers written out, and the reference's logits but for activations rounded to BF16."""
    bf16 = Pipeline.parse(PIPELINE.replace(",dtype=float32", ""))(capture(model()))
    made = short(bf16, layers)
    found = []
    find_loop = function.find_loop
    monkeypatch.setattr(function, "find_loop", lambda nodes: found.append(find_loop(nodes)) or found[-1])
    tokens = random_tokens(made, 9, rng)
    rolled = Compiled(made).decode("draft", tokens, 3)
    assert len(found[0].bodies) == len(planes(made, "draft"))
    monkeypatch.setattr(function, "find_loop", lambda nodes: None)
    assert np.array_equal(Compiled(made).decode("draft", tokens, 3), rolled)
    expected = run(made, made.entries["draft"], torch.tensor([tokens]))[0]
    assert_close(torch.from_numpy(rolled), expected, rtol=0, atol=0.05 * expected.std().item())


def test_operators_and_counts(program: Program):
    result = SkipLayers(layers=("1", "2", "5"))(program, "draft")
    assert result.rewrites == 3
    assert result.refusals == ()
    before, after = ops(program, "draft"), ops(result.program, "draft")
    each = (len(before) - len(after)) // 3
    assert before[:5] == after[:5]
    assert len(before) - len(after) == 3 * each
    assert str(Pipeline.parse("draft: skip-layers{layers=1|3-4}")) == "draft: skip-layers{layers=1|3-4}"


@pytest.mark.parametrize(
    ("entry", "layers", "why"),
    [
        ("target", "1", "this is the target, whose output must stay what it is"),
        ("draft", "6", "there is no layer 6 that can go; there are 0 to 5"),
        ("draft", "0-5", "all layers would go; leave one"),
    ],
)
def test_what_is_refused(program: Program, entry: str, layers: str, why: str):
    result = SkipLayers(layers=(layers,))(program, entry)
    assert [r.why for r in result.refusals] == [why]
    assert result.rewrites == 0


def test_a_second_time_changes_nothing(program: Program):
    once = SkipLayers(layers=("2",))(program, "draft").program
    again = SkipLayers(layers=("2",))(once, "draft")
    assert [r.why for r in again.refusals] == [
        "draft lacks layers already; name all that are to go in one step"
    ]
    assert again.rewrites == 0
    # A copy of a shortened draft is another entry, whose layers have numbers of their own.
    both = Pipeline.parse("draft: derive-draft{entry=b}, b: skip-layers{layers=0}")(once)
    assert (planes(both, "draft"), planes(both, "b")) == ([0, 1, 3, 4, 5], [1, 3, 4, 5])


def test_graphs_without_layers_are_refused():
    made = Pipeline.parse("derive-draft")(of(Decoder(lambda m, x, _: torch.relu(x))))
    (refusal,) = SkipLayers(layers=("0",))(made, "draft").refusals
    assert refusal.why == "no layers are found: not one value alone flows from each attention to the next"


def test_a_search_needs_a_cache(captured: Program):
    (refusal,) = SkipLayers()(Pipeline.parse("derive-draft")(captured).copy(), "draft").refusals
    assert refusal.why == "a search needs a cache, as drafting does; put insert-kv-cache first"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("layers=x", "'x' names no layers; write numbers or ranges from 0 on"),
        ("layers=3-1", "'3-1' names no layers"),
        ("layers=-1", "'-1' names no layers"),
        ("tokens=127", "127 tokens are too few to search on; give 128 or more"),
        ("gain=-0.1", "a gain of -0.1 cannot be asked for"),
        ("gain=nan", "a gain of nan cannot be asked for"),
        ("gain=inf", "a gain of inf cannot be asked for"),
    ],
)
def test_options_out_of_range(options: str, why: str):
    with pytest.raises(InputError, match=f"skip-layers: {why}"):
        Pipeline.parse(f"skip-layers{{{options}}}")

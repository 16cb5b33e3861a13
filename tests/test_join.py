"""A separate checkpoint as a draft: joined, compiled, and refused when its tokens mean something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import specqd
from specqd.build import default_pipeline
from specqd.codegen import library
from specqd.errors import InputError
from specqd.frontends import capture
from specqd.passes import Pipeline
from specqd.passes.speculate.join import join
from specqd.program import Program


def small(layers: int, vocab: int = 61, positions: int = 96, files: tuple[str, ...] = ()) -> Program:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    program = capture(made)
    return replace(program, model=replace(program.model, tokenizer_files=files))


def tokenizer(folder: Path, **changes: object) -> tuple[str, ...]:
    folder.mkdir()
    content = {
        "normalizer": None,
        "pre_tokenizer": None,
        "model": {"type": "BPE", "vocab": {"a": 0}},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    return (str(folder / "tokenizer.json"),)


def test_the_draft_keeps_its_own_weights_and_gets_its_own_cache():
    target, other = small(2), small(1)
    before = set(target.weights)
    joined = Pipeline.parse("insert-kv-cache{capacity=64}")(join(target, other, "sibling"))
    assert joined.chain == ("target", "sibling")
    assert set(joined.caches) == {"kv", "sibling_kv"}
    assert set(target.weights) == before and set(target.entries) == {"target"}
    assert {n for n in joined.weights if n.startswith("sibling.")} == {f"sibling.{n}" for n in other.weights}


def test_a_draft_that_knows_fewer_positions_gets_a_smaller_cache():
    joined = join(small(1), small(1, positions=32), "sibling")
    caches = Pipeline.parse("insert-kv-cache{capacity=64}")(joined).caches
    assert (caches["kv"].capacity, caches["sibling_kv"].capacity) == (64, 32)


def test_a_draft_that_knows_more_positions_gets_the_cache_of_the_target():
    joined = join(small(1, positions=48), small(1), "sibling")
    caches = Pipeline.parse("insert-kv-cache")(joined).caches
    assert (caches["kv"].capacity, caches["sibling_kv"].capacity) == (48, 48)


def test_padded_vocabularies_of_one_tokenizer_go_together(tmp_path: Path):
    files = tokenizer(tmp_path / "a")
    assert join(small(1, files=files), small(1, vocab=64, files=files), "sibling").chain == (
        "target",
        "sibling",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE", "vocab": {"b": 0}}}, "the model of its tokenizer is another"),
        ({"added_tokens": [{"id": 9}]}, "the added tokens of its tokenizer is another"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, changes: dict[str, object], message: str):
    ours, theirs = tokenizer(tmp_path / "a"), tokenizer(tmp_path / "b", **changes)
    with pytest.raises(InputError, match=message):
        join(small(1, files=ours), small(1, files=theirs), "sibling")


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(InputError, match="it knows 64 tokens and the target 61"):
        join(small(1), small(1, vocab=64), "sibling")
    with pytest.raises(InputError, match=r"cannot name the draft.*the program has target"):
        join(small(1), small(1), "target")
    with pytest.raises(InputError, match="before insert-kv-cache"):
        join(Pipeline.parse("insert-kv-cache")(small(1)), small(1), "sibling")


@pytest.mark.slow
def test_chains_over_a_joined_draft_give_the_targets_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A context that ends before the target's, a vocabulary with padding, and a level below it."""
    files = tokenizer(tmp_path / "t")
    joined = join(small(2, files=files), small(1, vocab=64, positions=48, files=files), "sibling")
    joined.model = replace(joined.model, tokenizer_files=())
    monkeypatch.setattr(library, "VERIFY_ROWS", (1, 4, 16))  # each takes a second or two to compile
    monkeypatch.setattr(library, "PREFILL_ROWS", ())
    manifest = specqd.compile(joined, tmp_path / "a", pipeline=default_pipeline(96, ("sibling",)))
    assert manifest.plan == (
        "target <- suffix:4@adaptive | sibling@adaptive | draft@adaptive <- suffix:3@adaptive"
    )
    model = specqd.load(tmp_path / "a")
    prompt = [5, 17, 3, 41, 3, 41, 3]
    plain = model.generate(prompt, 80, speculate=False, ignore_eos=True).tokens
    for plan in (
        manifest.plan,
        "target <- sibling@fixed:3",
        "target <- draft@fixed:4 <- sibling@fixed:2 <- suffix:1@fixed:2",
        "target <- suffix:3@fixed:15 | sibling@adaptive | draft@confidence:0.3",
        "target <- sibling@fixed:12 <- suffix:1@fixed:15",
    ):
        made = model.generate(prompt, 80, plan=plan, ignore_eos=True)
        assert made.tokens == plain, plan
        assert made.stats.drafted > 0, plan

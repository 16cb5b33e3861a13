"""Selections while decoding: in the target, and for a draft alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import llama
from transformers import AutoModelForCausalLM, LlamaConfig

import specqd
from specqd.build import compile_model, default_pipeline
from specqd.cli import main
from specqd.errors import InputError
from specqd.frontends import capture
from specqd.manifest import BLOCK
from specqd.passes import Pipeline
from specqd.runtime.batch import Batch
from specqd.runtime.model import Model

SIZES = "tokens=64,every=32,sinks=2,recent=16"
PLANS = (
    "target <- draft@fixed:3",
    "target <- draft@fixed:5 <- suffix:2@fixed:3",
    "target <- suffix:2@fixed:7",
)


def made(folder: Path, selecting: str, capacity: int = 512) -> Path:
    """Compile a random Llama of 131072 positions with a selection."""
    config = LlamaConfig(
        vocab_size=83, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    compile_model(capture(model), folder, pipeline=f"{default_pipeline(capacity)}, {selecting}", isa="native")
    return folder


@pytest.fixture(scope="module")
def of_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("of_draft") / "artifact", f"draft: select-kv{{{SIZES}}}")


@pytest.fixture(scope="module")
def of_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(
        tmp_path_factory.mktemp("of_target") / "artifact",
        f"select-kv{{method=kvcrush,scorer=h2o,{SIZES}}}",
        capacity=128,
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 83, length).tolist()


def answer(model: Model, tokens: list[int], count: int, plan: str | None) -> list[int]:
    return model.generate(tokens, count, plan=plan, speculate=plan is not None, ignore_eos=True).tokens


@pytest.mark.parametrize("length", [5, 64, 65, 200])
@pytest.mark.parametrize("plan", PLANS)
def test_a_draft_that_sees_less_changes_nothing(of_draft: Path, length: int, plan: str) -> None:
    model = specqd.load(of_draft, 2)
    plain = answer(model, prompt(length), 150, None)
    assert answer(model, prompt(length), 150, plan) == plain
    model.engine.schedule = lambda: None  # type: ignore[method-assign]
    assert answer(model, prompt(length), 150, None) == plain


@pytest.mark.parametrize("length", [5, 64, 65, 110, 500])
@pytest.mark.parametrize("plan", PLANS)
def test_speculation_leaves_a_selecting_target_as_it_is(of_target: Path, length: int, plan: str) -> None:
    model = specqd.load(of_target, 2)
    plain = answer(model, prompt(length), 200, None)
    assert len(plain) == 200
    assert answer(model, prompt(length), 200, plan) == plain


def test_a_text_longer_than_the_cache_goes_on_in_constant_memory(of_target: Path) -> None:
    model = specqd.load(of_target, 2)
    tables = model.engine.tables
    total = 0
    for new in model.tokens(prompt(90), 100_000, plan="target <- suffix:2@fixed:7", ignore_eos=True):
        total += len(new)
        held = [len(tables.blocks(s)) for s in range(tables.sequences)]
        assert sum(held) <= 128 // BLOCK
        assert sum(held) + len(tables._free) + len(tables._kept) == tables.pool
    assert total == 100_000


def test_selecting_sequences_of_a_batch_get_what_they_get_alone(of_target: Path) -> None:
    model, alone = specqd.load(of_target, 2, sequences=3), specqd.load(of_target, 2)
    prompts = [prompt(length, seed) for seed, length in enumerate((70, 100, 5, 300))]
    together = model.generate_many(prompts, 120, plan=PLANS[0], ignore_eos=True)
    assert [one.tokens for one in together] == [answer(alone, p, 120, PLANS[0]) for p in prompts]
    assert len(Batch(model.engine)) == 0


def test_inspect_shows_caches_and_what_is_selected(
    of_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(of_target)])
    shown = capsys.readouterr().out
    assert "kv: 2 layers x 2 heads, 128 bytes of bfloat16 keys and 128 of bfloat16 values a position" in shown
    assert (
        "64 positions for target by kvcrush (scorer h2o, share 0.25, anchor random, seed 0), every 32"
        in shown
    )


def test_a_cache_too_small_for_the_selection_is_refused(of_target: Path) -> None:
    with pytest.raises(InputError, match="holds 80 positions, and the artifact selects 64 of 96"):
        specqd.load(of_target, 2, cache_tokens=80)


def test_what_the_model_does_not_know_is_refused(of_target: Path) -> None:
    model = specqd.load(of_target, 2)
    with pytest.raises(InputError, match="131072"):
        answer(model, prompt(131073), 10, None)
    assert model.engine.capacity == 131072


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        ("select-kv", "select for a draft only"),
        ("draft: share-kv, draft: select-kv, select-kv", "select once"),
        ("draft: select-kv", "put share-kv first"),
    ],
)
def test_refusals_say_why(pipeline: str, why: str) -> None:
    prepared = default_pipeline(168).removesuffix(", draft: share-kv")
    program = Pipeline.parse(prepared)(capture_llama())
    refused = [r for event in Pipeline.parse(pipeline)(program).history for _, r in event.refused]
    assert any(why in reason for reason in refused)


def capture_llama() -> specqd.Program:
    config = LlamaConfig(
        vocab_size=83, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return capture(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("tokens=60", "no more than the 4 sinks and 64 recent"),
        ("method=nothing", "no selection method is named 'nothing'"),
        ("window=128", "at least the window as recent"),
        ("method=kvcrush,share=2.0", "share is 2.0"),
        ("method=key-diff", "key-diff needs keys"),
        ("method=pyramidkv", "sizes of their own"),
        ("method=kvcrush,scorer=tova", "kvcrush needs keys and queries"),
        ("tokens=200,ratio=0.5", "give one of them"),
        ("ratio=1.0", "a ratio below 1"),
        ("every=0", "1 or more of the rest"),
    ],
)
def test_impossible_options_are_refused(options: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        Pipeline.parse(f"select-kv{{{options}}}")


@pytest.mark.parametrize(
    ("options", "tokens"), [("", 168), ("ratio=0.25", 126), ("mb=0.01", 104), ("tokens=100", 100)]
)
def test_budgets_are_tokens_megabytes_or_a_part_of_the_capacity(options: str, tokens: int) -> None:
    program = Pipeline.parse(f"draft: select-kv{{{options}}}" if options else "draft: select-kv")(llama())
    assert program.selections["draft"].tokens == tokens


def test_a_budget_of_too_few_megabytes_is_refused() -> None:
    with pytest.raises(InputError, match="52 tokens are no more than the 4 sinks"):
        Pipeline.parse("draft: select-kv{mb=0.005}")(llama())


def test_a_draft_of_llama_has_its_observer_once() -> None:
    program = Pipeline.parse("draft: select-kv{tokens=100}")(llama())
    assert list(program.entries) == ["target", "draft", "observer"]
    again = Pipeline.parse("draft: select-kv{tokens=100}")(program)
    assert again.history[-1].refused
    assert str(again.entries["observer"].graph) == str(program.entries["observer"].graph)

"""Selections while decoding: in the target, and for a draft alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import llama, with_bf16_activations
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import specqd
from specqd.artifact import open_artifact
from specqd.build import compile_model, default_pipeline
from specqd.cli import main
from specqd.codegen import library
from specqd.codegen.isa import named
from specqd.errors import InputError
from specqd.frontends import capture
from specqd.manifest import BLOCK, OBSERVER
from specqd.passes import Pipeline
from specqd.planning.tuning import tune
from specqd.reference import Interpreter, inputs, new_caches, run
from specqd.runtime.batch import Batch
from specqd.runtime.cpu import cpu_features
from specqd.runtime.engine import Engine, Piece
from specqd.runtime.model import Model
from specqd.runtime.output import Output
from specqd.runtime.sampling import Sampling
from specqd.runtime.selections import selection_of
from specqd.selection import Observed, keep, method

SIZES = "tokens=64,above=64,every=32,window=16,sinks=2,recent=16"
PLANS = (
    "target <- draft@fixed:3",
    "target <- draft@fixed:5 <- suffix:2@fixed:3",
    "target <- suffix:2@fixed:7",
)


OF_TARGET = f"select-kv{{method=kvcrush,scorer=h2o,{SIZES}}}"


def random_llama() -> LlamaForCausalLM:
    """A random Llama of 131072 positions."""
    config = LlamaConfig(
        vocab_size=83, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def made(folder: Path, selecting: str, capacity: int = 512) -> Path:
    """Compile the random Llama with a selection."""
    with pytest.MonkeyPatch.context() as patch:  # each number of rows takes a second or two to compile
        patch.setattr(library, "VERIFY_ROWS", (1, 4, 16))
        patch.setattr(library, "PREFILL_ROWS", (32,))
        compile_model(capture(random_llama()), folder, pipeline=f"{default_pipeline(capacity)}, {selecting}")
    return folder


@pytest.fixture(scope="module")
def of_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("of_draft") / "artifact", f"draft: select-kv{{{SIZES}}}")


@pytest.fixture(scope="module")
def of_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(
        tmp_path_factory.mktemp("of_target") / "artifact",
        OF_TARGET,
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


@pytest.mark.parametrize("sampling", [None, Sampling(seed=1, coupling="rejection")])
def test_a_draft_is_selected_for_in_passes_that_check_it(of_draft: Path, sampling: Sampling | None) -> None:
    model, log = specqd.load(of_draft, 2), list[tuple[str, int]]()
    feed = model.engine.feed_pieces

    def noted(entry: str, pieces: Sequence[Piece]) -> Output:
        log.append((entry, pieces[0].start + len(pieces[0].tokens)))
        return feed(entry, pieces)

    model.engine.feed_pieces = noted  # type: ignore[method-assign]
    plan = "target <- draft@fixed:3"
    answered = model.generate(prompt(5), 150, plan=plan, sampling=sampling, ignore_eos=True)
    before = [log[i - 1][0] for i, (entry, _) in enumerate(log) if entry == OBSERVER]
    assert len(before) > 1 and set(before) == {"draft"}
    assert len(answered.tokens) == 150


def test_nothing_is_selected_for_a_plan_that_has_no_use_for_it(of_draft: Path, of_target: Path) -> None:
    model, selections = specqd.load(of_draft, 2), []
    select = model.engine._selection.select
    model.engine._selection.select = lambda *given: selections.append(given) or select(*given)
    plain = answer(model, prompt(200), 100, None)
    assert answer(model, prompt(200), 100, "target <- draft:whole@fixed:3") == plain and not selections
    assert answer(model, prompt(200), 100, "target <- draft@fixed:3") == plain and selections
    with pytest.raises(
        InputError, match="asks for draft:whole, and it is target that positions are selected"
    ):
        answer(specqd.load(of_target, 2), prompt(5), 2, "target <- draft:whole")


def test_tuning_tries_the_best_plans_with_a_draft_that_sees_all_too(of_draft: Path) -> None:
    def tried(length: int) -> set[str]:
        prompts = [prompt(length, seed) for seed in range(4)]  # some are answered with the end of sequence
        trials = tune(of_draft, prompts, new_tokens=8, raw=True, store=False).trials
        return {trial.plan for trial in trials}

    above = open_artifact(of_draft).manifest.selection.above
    assert not any(":whole" in plan for plan in tried(above - 20))
    plans = tried(above + 20)
    assert 1 <= sum("draft:whole" in plan for plan in plans) <= 2
    assert {plan.replace(":whole", "") for plan in plans} <= plans


@pytest.mark.parametrize("length", [5, 64, 65, 110, 500])
@pytest.mark.parametrize("plan", PLANS)
def test_speculation_leaves_a_selecting_target_as_it_is(of_target: Path, length: int, plan: str) -> None:
    model = specqd.load(of_target, 2)
    plain = answer(model, prompt(length), 200, None)
    assert len(plain) == 200
    assert answer(model, prompt(length), 200, plan) == plain


def observed(engine: Engine, length: int) -> Iterator[Observed]:
    """What the observer saw of each layer of a text, when it was last asked."""
    received = engine._bound[OBSERVER, 16].received.reshape(4, -1)[:, :length]
    for layer in range(2):
        positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
        yield Observed(positions, measured=received[layer * 2 : layer * 2 + 2], layer=layer, layers=2)


def held(engine: Engine, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys int32 `[planes, length, pairs]` and values int16 `[planes, length, channels]` of sequence 0."""
    blocks = engine.tables.blocks(0)
    keys, values = (
        buffer.reshape(4, engine.tables.pool, -1)[:, blocks] for buffer in engine.memory.cache("kv")
    )
    keys = keys.reshape(4, len(blocks), 8, BLOCK).swapaxes(2, 3)
    return keys.reshape(4, -1, 8)[:, :length], values.reshape(4, -1, 16)[:, :length]


def read(engine: Engine, text: list[int]) -> None:
    """Feed a text, the last 16 tokens by the observer."""
    last = len(text) - 16
    for start in range(0, last, 16):
        engine.feed("target", text[start : min(start + 16, last)], start)
    engine.feed(OBSERVER, text[last:], last)


def test_what_is_kept_is_what_the_method_chooses_and_lies_in_front(of_draft: Path, of_target: Path) -> None:
    """Of two artifacts of one model, the one drops what the other still has."""
    whole, selecting = specqd.load(of_draft, 2).engine, specqd.load(of_target, 2).engine
    for engine in (whole, selecting):
        read(engine, prompt(100))
    chosen = method("kvcrush", scorer="h2o")
    kept = np.concatenate([keep(chosen, one, 64, sinks=2, recent=16) for one in observed(whole, 100)])
    assert not np.array_equal(kept[0], kept[1])
    assert selecting.tables.dropped(0) == 36
    for all_of_it, rest in zip(held(whole, 100), held(selecting, 64), strict=True):
        assert np.array_equal(rest, np.take_along_axis(all_of_it, kept[..., None], axis=1))


class Shifted(Interpreter):
    """Runs an entry on caches in which each slot is `missing` before its position."""

    missing = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.specqd.cached_attention.default:
            args = (*args[:5], args[5] - self.missing, *args[6:])
        return super().call_function(target, args, kwargs)


def test_after_a_selection_the_target_says_what_eager_attention_to_the_rest_says(of_target: Path) -> None:
    text, engine = prompt(100), specqd.load(of_target, 2).engine
    program = Pipeline.parse(f"{default_pipeline(128)}, {OF_TARGET}")(capture(random_llama()))
    if named("native", cpu_features()).pairs:
        program = with_bf16_activations(program, "target")
    read(engine, text)
    kept = engine._selection._stood[0][1]["kv"]
    logits = engine.feed("target", [5], 100).logits[0].copy()

    caches = new_caches(program)
    run(program, program.target, torch.tensor([text]), caches=caches)
    whole = {name: tensor.clone() for name, tensor in caches.items()}
    places = torch.from_numpy(kept).long().reshape(2, 2, 64, 1)
    for part in "kv":
        cache = caches[f"kv_{part}"]
        cache[:, :, :64] = cache.gather(2, places.expand(-1, -1, -1, cache.shape[3]))
    interpreter = Shifted(program, program.target)

    def said(caches: dict[str, torch.Tensor], missing: int) -> np.ndarray:
        interpreter.missing = missing
        given = inputs(program.target, torch.tensor([[5]]), torch.tensor([[100]]), caches)
        with torch.no_grad():
            return interpreter.run(*given)[0, 0].numpy()

    off = np.abs(logits - said(caches, 36)).max()
    assert off < 0.02 * logits.std()
    assert np.abs(logits - said(whole, 0)).max() > 10 * off, "what was dropped made no difference"


def test_a_draft_has_the_best_blocks_of_each_plane(of_draft: Path) -> None:
    engine = specqd.load(of_draft, 2).engine
    read(engine, prompt(200))
    begin, blocks = engine._begin("draft", 0, 200), engine.tables.blocks(0)
    assert engine._begin("target", 0, 200) == engine.tables.begin(0) != begin
    size, tables = engine.tables.flat[begin], engine.tables.flat[begin + 1 :]
    for layer, one in enumerate(observed(engine, 176)):
        smooth = np.stack([np.convolve(row, np.ones(5) / 5, "same") for row in one.received])
        pages = smooth[:, 16:].reshape(2, 10, 16).sum(-1)
        for head, best in enumerate(pages.argmax(1) + 1):
            table = tables[(layer * 2 + head) * size :]
            assert table[0] == 9 * BLOCK
            assert table[1:5].tolist() == [blocks[0], blocks[best], blocks[11], blocks[12]]


def select_by(engine: Engine, name: str, window: int = 16, **options: Any) -> None:
    """Let an engine select by another method than its artifact was compiled for."""
    selection = engine.manifest.selection.model_copy(
        update={"method": name, "options": options, "window": window}
    )
    changed = engine.manifest.model_copy(update={"selection": selection})
    engine._selection = selection_of(changed, engine.tables, engine.memory, engine.find)


def in_eager_torch(program: specqd.Program, text: list[int], window: int) -> dict[str, torch.Tensor]:
    """The caches after a text whose last `window` tokens the observer read."""
    if named("native", cpu_features()).pairs:
        for name in ("target", OBSERVER):
            program = with_bf16_activations(program, name)
    caches, last = new_caches(program), len(text) - window
    run(program, program.target, torch.tensor([text[:last]]), caches=caches)
    given = torch.tensor([text[last:]]), torch.arange(last, len(text))[None]
    observer = program.entry(OBSERVER)
    with torch.no_grad():
        Interpreter(program, observer).run(*inputs(observer, *given, caches))
    return caches


def layers_in_eager_torch(program: specqd.Program, text: list[int], window: int) -> Iterator[Observed]:
    """What there is to see of each layer, from the caches of eager attention."""
    caches = in_eager_torch(program, text, window)
    positions = np.tile(np.arange(len(text), dtype=np.int32), (2, 1))
    for layer in range(2):
        keys, received = (
            caches[f"kv_{part}"][layer, :, : len(text)].float().numpy() for part in ("k", "received")
        )
        yield Observed(positions, keys=keys, measured=received, window=window, layer=layer, layers=2)


BY_KEYS = {"key-norm": {}, "key-diff": {}, "r-kv": {}, "kvcrush": {"scorer": "key-diff", "share": 0.0}}


@pytest.mark.parametrize("name", BY_KEYS)
def test_by_its_keys_the_target_keeps_what_scores_highest_in_eager_torch(of_target: Path, name: str) -> None:
    text, engine = prompt(100), specqd.load(of_target, 2).engine
    select_by(engine, name, **BY_KEYS[name])
    read(engine, text)
    stood = engine._selection._stood[0][1]["kv"]
    program = Pipeline.parse(f"{default_pipeline(128)}, {OF_TARGET}")(capture(random_llama()))
    chosen = method(name, **BY_KEYS[name])
    for layer, one in enumerate(layers_in_eager_torch(program, text, 16)):
        for scores, kept in zip(chosen.score(one), stood[layer * 2 : layer * 2 + 2], strict=True):
            assert {0, 1, *range(84, 100)} <= set(kept.tolist()) and len(kept) == 64
            those = np.isin(np.arange(2, 84), kept)
            between = scores[2:84]
            # Compiled products round in another order, which may swap two that are all but equal.
            assert between[those].min() > between[~those].max() - 0.05 * between.std()


@pytest.mark.parametrize("name", ["key-diff", "r-kv"])
def test_by_its_keys_a_draft_sees_the_blocks_that_score_highest_in_eager_torch(
    of_draft: Path, name: str
) -> None:
    text, engine = prompt(200), specqd.load(of_draft, 2).engine
    select_by(engine, name)
    read(engine, text)
    begin, blocks = engine._begin("draft", 0, 200), engine.tables.blocks(0)
    size, tables = engine.tables.flat[begin], engine.tables.flat[begin + 1 :]
    program = Pipeline.parse(f"{default_pipeline(512)}, draft: select-kv{{{SIZES}}}")(capture(random_llama()))
    for layer, one in enumerate(layers_in_eager_torch(program, text, 16)):
        pages = method(name).score(one)[:, 16:176].reshape(2, 10, 16).sum(-1)
        for head, of_head in enumerate(pages):
            table = tables[(layer * 2 + head) * size :]
            assert table[[0, 1, 3, 4]].tolist() == [9 * BLOCK, blocks[0], blocks[11], blocks[12]]
            assert of_head[blocks.index(table[2]) - 1] > of_head.max() - 0.05 * of_head.std()


def test_tova_keeps_for_all_heads_what_the_newest_query_attends_to(of_target: Path) -> None:
    text, engine = prompt(100), specqd.load(of_target, 2).engine
    select_by(engine, "tova", window=1)
    for start in range(0, 100, 10):
        engine.feed("target", text[start : start + 10], start)
    program = Pipeline.parse(f"{default_pipeline(128)}, {OF_TARGET}")(capture(random_llama()))
    weights = in_eager_torch(program, text, 1)["kv_received"][:, :, :100]
    engine._selection.select(0, 100, weights.reshape(4, 100).numpy())
    stood = engine._selection._stood[0][1]["kv"]
    for layer, of_heads in enumerate(weights.double()):
        assert np.array_equal(*stood[layer * 2 : layer * 2 + 2])
        best = of_heads.mean(0)[2:84].topk(64 - 18).indices.sort().values + 2
        assert stood[layer * 2, 2:-16].tolist() == best.tolist()


def test_a_pyramid_gives_a_draft_more_of_the_lower_layers_and_changes_nothing(tmp_path: Path) -> None:
    sizes = "tokens=112,above=112,every=32,window=16,sinks=2,recent=16"
    artifact = made(tmp_path / "artifact", f"draft: select-kv{{method=pyramidkv,{sizes}}}")
    model = specqd.load(artifact, 2)
    engine = model.engine
    read(engine, prompt(300))
    begin, blocks = engine._begin("draft", 0, 300), engine.tables.blocks(0)
    size, tables = engine.tables.flat[begin], engine.tables.flat[begin + 1 :]
    # 4 blocks on average, of 16: the upper layer is given a twentieth of that, which rounds to none.
    for layer, one in enumerate(observed(engine, 300)):
        kept = (8, 0)[layer]
        pages = method("snapkv").score(replace(one, window=16))[:, 16:272].reshape(2, 16, 16).sum(-1)
        for head, of_head in enumerate(pages):
            table = tables[(layer * 2 + head) * size :]
            best = np.sort(np.argsort(-of_head, kind="stable")[:kept]) + 1
            expected = [(16 - kept) * BLOCK, *(blocks[at] for at in (0, *best, 17, 18))]
            assert table[: len(expected)].tolist() == expected
    for plan in (PLANS[0], PLANS[2]):
        plain = answer(model, prompt(300), 150, None)
        assert answer(model, prompt(300), 150, plan) == plain


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
        ("draft: share-kv, select-kv{method=pyramidkv}", "select for a draft"),
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
        ("method=expected-attention", "needs queries and rope and values, which no compiled code hands out"),
        ("method=kvcrush,scorer=tova", "kvcrush looks at the newest query alone: give window=1"),
        ("tokens=200,ratio=0.5", "give one of them"),
        ("ratio=1.0", "a ratio below 1"),
        ("every=0", "1 or more of the rest"),
        ("above=-1", "0 or more sinks, above and window"),
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
    assert program.selection.tokens == tokens


@pytest.mark.parametrize(
    ("step", "above"),
    [
        ("draft: select-kv{tokens=100}", 400),
        ("draft: select-kv{tokens=100,above=150}", 150),
        ("draft: select-kv{tokens=100,above=5}", 100),
    ],
)
def test_by_default_a_draft_sees_four_times_what_it_keeps(step: str, above: int) -> None:
    program = Pipeline.parse(f"{default_pipeline(168)}, {step}")(capture_llama())
    assert program.selection is not None
    assert program.selection.above == above
    assert program.selection.window == (4 if step.startswith("draft") else 16)


def test_a_budget_of_too_few_megabytes_is_refused() -> None:
    with pytest.raises(InputError, match="52 tokens are no more than the 4 sinks"):
        Pipeline.parse("draft: select-kv{mb=0.005}")(llama())


def test_a_draft_of_llama_has_its_observer_once() -> None:
    program = Pipeline.parse("draft: select-kv{tokens=100}")(llama())
    assert list(program.entries) == ["target", "draft", "observer"]
    again = Pipeline.parse("draft: select-kv{tokens=100}")(program)
    assert again.history[-1].refused
    assert str(again.entries["observer"].graph) == str(program.entries["observer"].graph)

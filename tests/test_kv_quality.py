"""The harness that measures compressed caches: its model against transformers, its texts, formats, rows."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from specqd.cache_formats import held
from specqd.passes.quantize.mxfp4 import decode, encode
from specqd.selection import StreamingLLM, keep

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LENGTH, MORE = 50, 9


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which are scripts beside each other and no package."""
    names = ("kv_model", "kv_plot", "kv_quality", "kv_rounding", "kv_tables", "kv_tasks", "kv_variants")
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(BENCHMARKS))


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.3,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(bench: SimpleNamespace) -> Any:
    return bench.kv_model.CacheModel(model=llama())


@pytest.fixture
def tokens(rng: torch.Generator) -> list[int]:
    return torch.randint(0, 97, (LENGTH + MORE,), generator=rng).tolist()


def test_a_text_is_read_as_transformers_reads_it(model, tokens):
    read = model.read(tokens, [3, LENGTH])
    with torch.inference_mode():
        expected = llama()(input_ids=torch.tensor([tokens])).logits[0, [3, LENGTH]]
    torch.testing.assert_close(read.logits, expected, rtol=1e-4, atol=1e-4)


def cut(bench, read, slots):
    layer_slots = [slots] * 3
    return [
        bench.kv_model.Layer(*(t[torch.arange(2)[:, None], torch.from_numpy(s)] for t in (layer.keys, layer.values)))
        for layer, s in zip(read.layers, layer_slots, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [LENGTH, 40, 12])
def test_a_cut_cache_says_what_transformers_says_with_those_tokens_masked(bench, model, tokens, budget):
    read = model.read(tokens[:LENGTH], [LENGTH - 1])
    slots = keep(StreamingLLM(), read.observed(LENGTH, 8)[0], budget, sinks=4, recent=8)
    other = keep(StreamingLLM(), read.observed(LENGTH, 8)[0], budget, sinks=2, recent=8)
    pasts = [cut(bench, read, those) for those in (other, slots)]
    logits = model.extend(pasts, tokens[LENGTH:], LENGTH)[1]
    visible = torch.ones(LENGTH + MORE, LENGTH + MORE, dtype=torch.bool).tril()
    gone = sorted(set(range(LENGTH)) - set(slots[0].tolist()))
    visible[LENGTH:, gone] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = llama()(input_ids=torch.tensor([tokens]), attention_mask=mask[None, None]).logits[
            0, LENGTH:
        ]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_one_pass_shows_the_cache_of_every_beginning(model, tokens):
    long, short = (
        model.read(tokens, [0]).observed(LENGTH, 8),
        model.read(tokens[:LENGTH], [0]).observed(LENGTH, 8),
    )
    for one, other in zip(long, short, strict=True):
        for name in ("keys", "values", "queries", "attention"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)
        assert (one.layer, one.layers, one.window) == (other.layer, 3, 8)
        np.testing.assert_allclose(one.rope, 10000.0 ** (-np.arange(8) / 8), rtol=1e-6)


def test_every_variant_keeps_the_same_tokens_in_total(bench, model):
    told = torch.randint(0, 97, (480,), generator=torch.Generator().manual_seed(0)).tolist()
    read = model.read(told, [0])
    seen, scorers = read.observed(480, 64), {}
    for variant in bench.kv_variants.VARIANTS:
        past = bench.kv_variants.compress(variant, scorers, seen, read, seed=0)
        assert sum(layer.keys.shape[1] for layer in past) == int(480 / variant.ratio) * 3, str(variant)
    assert len({str(v) + str(v.ratio) for v in bench.kv_variants.VARIANTS}) == len(bench.kv_variants.VARIANTS)


def test_random_proxies_are_other_tokens_than_the_scorers_best(bench, model, tokens):
    seen = model.read(tokens, [0]).observed(LENGTH + MORE, 8)[0]
    proxies = bench.kv_variants.RandomProxies(share=0.5)
    alone = keep(proxies.scorer, seen, 18 + 11, recent=8)
    slots = keep(proxies, seen, 12 + 34, recent=8)
    assert all(len(set(head)) == 46 for head in slots.tolist())
    assert all(set(few) <= set(many) for few, many in zip(alone.tolist(), slots.tolist(), strict=True))


def test_formats_round_within_their_steps(bench, rng):
    x = torch.randn(2, 70, 16, generator=rng) * 3
    layer = bench.kv_model.Layer(x, x)
    bf16 = 1 + 2.0**-7  # a scale or zero point in BF16
    eight = bench.kv_rounding.FORMATS["int8"].round(layer)
    half_step = x.abs().amax(-1, keepdim=True) / 127 / 2
    assert ((eight.keys - x).abs() <= 1.02 * half_step * bf16).all(), (
        "also where a smaller scale clips the largest"
    )
    assert torch.equal(eight.keys, eight.values)
    four = bench.kv_rounding.FORMATS["int4"].round(layer)
    spread = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    lost = x.abs().amax(-1, keepdim=True) * 2.0**-7
    assert ((four.values - x).abs() <= spread / 30 * bf16 + 2 * lost).all()
    assert torch.equal(four.keys[:, 64:], x[:, 64:]), "a partial group of 32 tokens is not rounded"
    first = four.keys[:, :32]
    assert all(len(first[0, :, channel].unique()) <= 16 for channel in range(16))
    assert all(len(four.values[0, token].unique()) <= 16 for token in range(70))
    wide = torch.randn(2, 70, 32, generator=rng) * 3
    micro = bench.kv_rounding.FORMATS["mxfp4"].round(bench.kv_model.Layer(wide, wide))
    assert torch.equal(micro.values, decode(*encode(wide, "search")))
    assert torch.equal(micro.keys[:, 32:64], decode(*encode(wide[:, 32:64].mT, "search")).mT)
    assert torch.equal(micro.keys[:, 64:], wide[:, 64:])
    bits = {name: form.bits(64) for name, form in bench.kv_rounding.FORMATS.items()}
    assert {name: bits[name] for name in ("bf16", "int8", "int4")} == {"bf16": 16, "int8": 8.25, "int4": 4.75}
    assert bits["mxfp4"] == 4.25
    assert 16 / bits["turbo4 keys, turbo3 values"] == 256 / 60
    turned = bench.kv_rounding.FORMATS["turbo4 keys, turbo3 values"].round(layer)
    assert torch.equal(turned.keys, held(x, "turbo4")) and torch.equal(turned.values, held(x, "turbo3"))


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def test_cuts_of_a_long_prompt_score_no_token_twice(bench, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"id": f"t{n}", "text": "x" * n}) for n in (500, 2000, 3001)))
    samples = bench.kv_tasks.long_prompts(file, Letters(), seeds=5, scored=128)
    assert [(s.name, s.seed) for s in samples] == [
        (name, seed) for name in ("t2000", "t3001") for seed in range(5)
    ]
    for sample in samples:
        assert sample.end >= len(sample.tokens) // 2 and sample.scored.start == sample.end + 1
        assert sample.scored.stop <= len(sample.tokens)
    for one, other in pairwise(samples[:5]):
        assert one.scored.stop <= other.scored.start


@pytest.mark.parametrize("asked_before", [True, False])
def test_questions_ask_for_what_is_buried(bench, asked_before):
    samples = bench.kv_tasks.retrieval(Letters(), {3000: 2, 5000: 1}, asked_before)
    assert len(samples) == 9 and len({(s.name, s.seed) for s in samples}) == 9
    for sample in samples:
        text, passkey = "".join(map(chr, sample.tokens)), "passkey" in sample.name
        answer, kept = text[sample.scored.start : sample.scored.stop], text[: sample.end]
        assert sample.scored.stop == len(text) and answer.isdigit() and len(answer) == 5
        assert kept.count(answer) == (2 if passkey else 1)
        assert ("What is the" in kept) == asked_before
        assert 0.7 * int(sample.name.split()[1]) < len(text) < 1.1 * int(sample.name.split()[1])
        thing = text[text.index("What is the ") + 12 : text.index("?", text.index("What is the "))]
        told = f"The pass key is {answer}" if passkey else f"{thing.removesuffix(' code')}: {answer}"
        assert told in kept and text.endswith(f"\n\n{told}")


def sample_row(bench, variant, seed, loss=0.0, found=None):
    task = {"task": "long prompts" if found is None else "asked before", "name": "a", "seed": seed}
    facts = {"nll": 1 + loss, "full_nll": 1.0, "kl": loss, "top1": 1.0, "found": bool(found)}
    return task | bench.kv_quality.asdict(variant) | facts


def test_rows_and_tables_of_known_figures(bench, tmp_path):
    variant = bench.kv_variants.Variant
    alone, crushed = variant("h2o", "h2o", 4), variant("kvcrush random", "h2o", 4)
    samples = [sample_row(bench, alone, seed, loss) for seed, loss in ((0, 0.1), (1, 0.3))]
    samples += [sample_row(bench, crushed, seed, loss) for seed, loss in ((0, 0.2), (1, 0.4))]
    samples += [sample_row(bench, alone, seed, found=found) for seed, found in ((0, True), (1, False))]
    rows = bench.kv_tables.rows(samples, {"h2o": 0.5}, dim=64)
    assert len(rows) == 4
    assert rows[0] == {
        "method": "h2o", "scorer": "h2o", "format": "bf16", "newest": 0, "where": "target", "tokens_ratio": 4,
        "bytes_ratio": 4, "ppl_loss": pytest.approx(math.expm1(0.1)), "kl": 0.1, "top1": 1.0,
        "retrieval": {"asked before": 1}, "selection_cost": 0.5, "prefill_cost": None, "tokens_per_s": None, "seed": 0,
    }  # fmt: skip
    reached, size, paired = bench.kv_tables.tables(samples, {"h2o": 0.5}, dim=64)
    assert {row[2] for row in reached.rows} == {"none"}
    assert size.figures["4 times fewer tokens"]["h2o"]["log_ppl_loss"] == pytest.approx((0.2, 0.1))
    assert size.rows[0] == [
        "h2o",
        "2",
        "4.0",
        "22.1 ± 12.2",
        "0.200 ± 0.100",
        "100.0 ± 0.0",
        "50 ± 50",
        "500",
    ]
    assert paired.figures["paired"]["kvcrush random on h2o at 4"]["log_ppl"] == pytest.approx((0.1, 0))
    full = variant("full", "full", 1, "int8")
    samples += [sample_row(bench, full, 0, 0.009), sample_row(bench, full, 0, found=True)]
    reached = bench.kv_tables.tables(samples, {}, dim=64)[0]
    assert reached.rows[0] == ["perplexity within 1 %", "any", "full, int8", "1.9", "0.9 ± 0.0", "100 ± 0"]
    assert [row[2] for row in reached.rows[1:]] == ["none", "full, int8", "none", "full, int8", "none"]
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib, the tables do not")
    bench.kv_plot.plot(samples, 64, tmp_path / "plot.png")
    rounds = [
        {"length": n, "plain": {"tokens/s": n / 10 + s}, "identical": True}
        for n in (100, 200)
        for s in (0, 5)
    ]
    bench.kv_plot.plot_time(rounds, tmp_path / "time.png")
    for name in ("plot.png", "time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_where_it_was(bench, model, tokens, tmp_path):
    variants = [bench.kv_variants.Variant("streaming-llm", "streaming-llm", ratio) for ratio in (1.1, 1.2)]
    long = [*tokens, *tokens]
    sample = bench.kv_tasks.Sample("long prompts", "a", 0, long, 99, range(100, 110))
    done = bench.kv_quality._Done(tmp_path / "kept.jsonl")
    done.add(bench.kv_quality.measure(model, sample, variants[:1], done))
    again = bench.kv_quality._Done(tmp_path / "kept.jsonl")
    assert again.rows == done.rows and len(again.rows) == 1
    assert again.covers(sample, variants[:1]) and not again.covers(sample, variants)
    more = bench.kv_quality.measure(model, sample, variants, again)
    assert [row["ratio"] for row in more] == [1.2]


def test_a_question_that_the_full_cache_does_not_answer_is_left_out(bench, model, tokens, tmp_path):
    done = bench.kv_quality._Done(tmp_path / "kept.jsonl")
    best = model.read(tokens, [LENGTH - 1]).logits.argmax(-1).item()
    wrong = [*tokens[:LENGTH], (best + 1) % 97]
    sample = bench.kv_tasks.Sample("asked before", "passkey", 0, wrong, 40, range(LENGTH, LENGTH + 1))
    (row,) = bench.kv_quality.measure(model, sample, bench.kv_variants.VARIANTS, done)
    assert row["method"] == "unsolved"
    done.add([row])
    assert done.covers(sample, bench.kv_variants.VARIANTS)

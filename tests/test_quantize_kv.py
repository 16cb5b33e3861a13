"""quantize-kv: what a quantised cache gives back, in the reference and in compiled code, and who may have one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compiled import NATIVE, RUNNABLE, Compiled, llama, random_tokens, threads, with_bf16_activations
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import logits
from test_codegen_attention import CASES, Case, attention, tokens
from test_passes_kv import program  # noqa: F401  (a fixture)
from torch import Tensor

from specqd.cache_formats import held
from specqd.errors import ContractError
from specqd.passes import Pipeline
from specqd.passes.kv.insert import InsertKVCache
from specqd.passes.kv.quantize import QuantizeKV
from specqd.passes.speculate.derive import DeriveDraft
from specqd.passes.speculate.share_kv import ShareKV
from specqd.program import KVCache, Program
from specqd.reference import run

CHOICES = {"keys and values": {}, "keys": {"values": "keep"}, "values": {"keys": "keep"}}


# -- what is given back ------------------------------------------------------------------------------------------------


def int8_by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers, and scales in BF16, of vectors: in float64, where nothing else is rounded."""
    scale = (x.double().abs().amax(-1, keepdim=True) / 127).float().bfloat16().double()
    return (x.double() / scale).round(), scale


@settings(deadline=None)
@given(exponent=st.integers(-100, 100), seed=st.integers(0, 2**31))
def test_int8_gives_back_the_nearest_of_255_multiples_of_a_bf16_scale(exponent, seed):
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    got = held(x, "int8")
    integers, scale = int8_by_hand(x)
    assert integers.abs().max() <= 127
    # The nearest multiple, but where float32 rounds x / scale to a half that it is not: there the other one.
    off = (got.double() - integers * scale).abs()
    halfway = ((x.double() / scale).frac().abs() - 0.5).abs() < 2.0**-16
    assert ((off == 0) | halfway).all() and (off <= scale).all()


def test_int8_keeps_zeros_and_what_is_on_its_grid():
    assert torch.equal(held(torch.zeros(3, 8), "int8"), torch.zeros(3, 8))
    grid = torch.arange(-127.0, 128.0) * 2.0**-9
    assert torch.equal(held(grid, "int8"), grid)


# -- the pass ----------------------------------------------------------------------------------------------------------


def cached(program: Program) -> Program:  # noqa: F811
    return InsertKVCache(capacity=32)(program).program


@pytest.mark.parametrize("choice", CHOICES)
def test_every_attention_says_what_it_rounds_to(choice, program):  # noqa: F811
    before = cached(program)
    result = QuantizeKV(**CHOICES[choice])(before)
    assert result.rewrites == 3 and not result.refusals
    wanted = ("int8" if choice != "values" else "", "int8" if choice != "keys" else "")
    calls = [n for n in result.program.target.graph.nodes if n.name.startswith("cached")]
    assert [n.args[11:] for n in calls] == [(*wanted, None, None, False)] * 3
    assert next(n.args[:11] for n in calls)[6:] == (0.3, 0, 0, 0.0, None)
    for name, cache in result.program.caches.items():
        assert (cache.key_dtype, cache.value_dtype) == tuple(w or "bfloat16" for w in wanted)
        assert replace(cache, key_dtype="bfloat16", value_dtype="bfloat16") == before.caches[name]


def test_a_quantised_cache_takes_half_the_bytes_and_says_so():
    plain = KVCache("kv", 3, 2, 64, 64, 100)
    assert plain.bytes == 3 * 2 * 100 * 256 and plain.dtype == "bfloat16"
    assert replace(plain, key_dtype="int8", value_dtype="int8").bytes == 3 * 2 * 100 * 132
    assert replace(plain, key_dtype="int8").dtype == "int8 keys, bfloat16 values"


def test_rounding_is_not_lossless_and_small(program):  # noqa: F811
    assert not QuantizeKV().lossless and QuantizeKV(keys="keep", values="keep").lossless
    before = cached(program)
    error = (logits(QuantizeKV()(before).program) - logits(before)).abs().max()
    assert 0 < error < 2e-2  # 7 bits of the largest of a key or value, all near 1


def test_who_has_no_cache_or_a_quantised_one_is_told_so(program):  # noqa: F811
    bare = QuantizeKV()(program)
    assert bare.rewrites == 0
    assert {r.why for r in bare.refusals} == {"this attention has no cache yet; put insert-kv-cache first"}
    once = QuantizeKV(values="keep")(cached(program)).program
    again = QuantizeKV()(once)
    assert again.rewrites == 0 and again.program.caches == once.caches
    assert [r.why for r in again.refusals] == [
        "the cache kv is quantised already: int8 keys, bfloat16 values",
        "the cache kv2 is quantised already: int8 keys, bfloat16 values",
        "the cache kv is quantised already: int8 keys, bfloat16 values",
    ]


def test_a_cache_and_who_writes_it_must_agree(program):  # noqa: F811
    broken = cached(program).copy()
    broken.caches["kv"] = replace(broken.caches["kv"], key_dtype="int8")
    with pytest.raises(ContractError, match="writes other formats to the cache kv than int8 keys, bfloat16"):
        QuantizeKV()(broken)


def test_a_draft_shares_a_quantised_cache_in_either_order(program):  # noqa: F811
    derived = DeriveDraft()(cached(program)).program
    one_by_one = Pipeline.parse("quantize-kv, draft: share-kv")(derived)
    at_once = Pipeline.parse("draft: share-kv, target: quantize-kv")(derived)
    assert one_by_one.caches == at_once.caches
    assert {c.dtype for c in at_once.caches.values()} == {"int8"}
    for made in (one_by_one, at_once):
        assert torch.equal(logits(made, "draft"), logits(made))
    apart = QuantizeKV()(derived).program
    refused = ShareKV()(apart, "draft").refusals
    assert "the target has no free cache of the shape of draft_kv" in refused[0].why
    assert "bfloat16); it has kv" in refused[0].why and "int8)" in refused[0].why


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choice"),
    [("group of 8, heads of 64", "keys and values"), ("odd heads", "keys"), ("all at once", "values")],
)
def test_compiled_attention_gives_what_the_reference_gives_whatever_the_rows(name, choice):
    made = Compiled(QuantizeKV(**CHOICES[choice])(attention(CASES[name])).program)
    text = tokens(150)
    made.fill_caches(0x7E00)
    got = made.decode("target", text, 1)
    wanted = run(made.program, made.program.target, torch.tensor([text]))[0].numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6)  # sums in another order
    with threads(2):
        assert np.array_equal(made.decode("target", text, 25), got)


@pytest.mark.parametrize("isa", RUNNABLE)
def test_every_instruction_set_rounds_alike(isa):
    made = Compiled(QuantizeKV()(attention(Case(key_dim=7, value_dim=5, capacity=20))).program, isa)
    made.decode("target", tokens(16), 4)
    for part, width in (("k", 7), ("v", 5)):
        x = made.program.weights[part][tokens(16)].view(16, 2, width).transpose(0, 1)
        scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16()
        integers = (x * scale.float().reciprocal()).round().to(torch.int8).numpy()
        blocks = made.caches[f"kv_{part}"].reshape(2, made.pool, -1)[:, made.tables[0, 0]].view(np.int8)
        scales = np.ascontiguousarray(blocks[:, -32:]).view(np.int16)
        assert np.array_equal(scales, scale[..., 0].view(torch.int16).numpy())
        kept = blocks[:, :-32]
        if part == "k":
            kept = kept.reshape(2, 8, 16).transpose(0, 2, 1)
            assert (kept[:, :, 7] == 0).all()
            kept = kept[:, :, :7]
        assert np.array_equal(kept.reshape(2, 16, width), integers)


def test_a_draft_on_the_same_quantised_cache_changes_no_bit_of_the_target(rng):
    """The draft writes to the positions that the target then overwrites; passes of many rows and of one alike."""
    made = Compiled(QuantizeKV()(llama()).program)
    assert {c.dtype for c in made.program.caches.values()} == {"int8"} and len(made.program.caches) == 1
    text = random_tokens(made.program, 40, rng)
    plain = made.decode("target", text, 1)
    rounded = with_bf16_activations(made.program, "target") if NATIVE.pairs else made.program
    wanted = run(rounded, rounded.target, torch.tensor([text]))[0].numpy()
    # Sums in another order move a key or value to the next INT8 now and then.
    assert np.abs(plain - wanted).mean() < 0.002 * wanted.std()
    assert np.abs(plain - wanted).max() < 0.05 * wanted.std()
    made.fill_caches(0x7E00)
    got = [made.feed("target", text[:4], 0)]
    for start in range(4, 40, 4):
        for at in range(start, start + 3):
            made.feed("draft", [(text[at] + 1) % 83], at)
        got.append(made.feed("target", text[start : start + 4], start))
    assert np.array_equal(np.concatenate(got), plain)

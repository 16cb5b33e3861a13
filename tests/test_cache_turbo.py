"""Caches of rotated keys and values of 3 to 5 bits: the codec, what compiled code keeps, and who works with it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accounting import demand_every_block
from compiled import EXTENDED, RUNNABLE, Compiled, array, jit, llama, random_tokens, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_int4 import PLANS, prompt
from test_codegen_attention import Case, attention, tokens
from test_passes_kv import program  # noqa: F401  (a fixture)
from test_quantize_kv import cached
from torch import Tensor
from tvm.script.ir_builder import IRBuilder

import specqd
from specqd.cache_formats import held, rotated
from specqd.codegen import library
from specqd.codegen.isa import TABLE
from specqd.codegen.tir import load, parallel, store, tirx
from specqd.errors import InputError
from specqd.lloyd_max import borders, magnitudes
from specqd.passes import Pipeline
from specqd.passes.kv.quantize import QuantizeKV
from specqd.program import KVCache, Program
from specqd.reference import run
from specqd.runtime.library import tensor

BITS = (3, 4, 5)
REPEATED = ("avx512", "avx512_bf16")  # which look up, and round, as amx does
TURBO = QuantizeKV(keys="turbo4", values="turbo3")


# -- what is given back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_each_level_is_the_mean_of_its_cell(bits):
    """Lloyd's condition on the normal distribution, of which the mean over a cell is known."""
    levels = magnitudes(bits)
    assert len(levels) == 2 ** (bits - 1)
    edges = [0.0, *borders(bits), math.inf]
    for level, (low, high) in zip(levels, pairwise(edges), strict=True):
        density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
        weight = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
        assert level == pytest.approx((density[0] - density[1]) / weight, abs=2e-7)


def by_hand(x: Tensor, bits: int) -> tuple[list[list[int]], list[float], list[list[float]]]:
    """Codes, scales and distances to the nearest border of vectors, one number at a time in float64."""
    levels = [*magnitudes(bits), *(-m for m in magnitudes(bits))]
    codes, scales, margins = [], [], []
    for vector in rotated(x).double().reshape(-1, x.shape[-1]).tolist():
        size = math.sqrt(sum(v * v for v in vector) / len(vector))
        units = [v / size for v in vector]
        nearest = [min(range(len(levels)), key=lambda c, u=u: abs(levels[c] - u)) for u in units]
        given_back = [levels[code] for code in nearest]
        scale = sum(a * b for a, b in zip(given_back, vector, strict=True)) / sum(a * a for a in given_back)
        codes.append(nearest)
        scales.append(torch.tensor(scale).bfloat16().item())
        margins.append([min(abs(abs(u) - border) for border in (0.0, *borders(bits))) for u in units])
    return codes, scales, margins


@settings(deadline=None, max_examples=30)
@given(
    bits=st.sampled_from(BITS),
    channels=st.sampled_from([32, 64, 96]),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
def test_the_nearest_level_is_given_back_times_the_scale_of_least_squares(bits, channels, exponent, seed):
    x = torch.randn(3, channels, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scales, margins = by_hand(x, bits)
    got = rotated(held(x, f"turbo{bits}")).double().numpy()
    levels = [*magnitudes(bits), *(-m for m in magnitudes(bits))]
    for vector, of_vector, scale, margin in zip(got, codes, scales, margins, strict=True):
        if min(margin) > 1e-5:  # else float32 may find the other side of a border
            wanted = scale * np.array([levels[code] for code in of_vector])
            np.testing.assert_allclose(vector, wanted, rtol=0, atol=scale * 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros_and_the_error_is_that_of_the_quantiser(bits, rng):
    assert torch.equal(held(torch.zeros(3, 64), f"turbo{bits}"), torch.zeros(3, 64))
    x = torch.randn(2000, 128, generator=rng)
    error = (held(x, f"turbo{bits}") - x).square().mean().item()
    # Max's table of least mean squared errors; the fitted scale takes a little off.
    assert error == pytest.approx({3: 0.03454, 4: 0.009497, 5: 0.002499}[bits], rel=0.05)


# -- the pass ----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_position_are_those_of_its_codes_and_two_scales():
    cache = KVCache("kv", 3, 2, 64, 64, 100, "turbo4", "turbo3")
    assert cache.bytes == 3 * 2 * 100 * (34 + 26) and not cache.whole_blocks
    assert replace(cache, key_dtype="turbo5").bytes == 3 * 2 * 100 * (42 + 26)


def test_every_attention_says_what_it_rounds_to_and_a_second_run_changes_nothing():
    before = attention(Case(key_dim=32, value_dim=64))
    once = TURBO(before)
    assert once.rewrites == 1 and not once.refusals and not TURBO.lossless
    (call,) = [n for n in once.program.target.graph.nodes if n.name.startswith("cached")]
    assert call.args[11:] == ("turbo4", "turbo3", None, None, False)
    assert once.program.caches["kv"] == replace(before.caches["kv"], key_dtype="turbo4", value_dtype="turbo3")
    again = TURBO(once.program)
    assert again.rewrites == 0 and again.program.caches == once.program.caches
    assert [r.why for r in again.refusals] == [
        "the cache kv is quantised already: turbo4 keys, turbo3 values"
    ]


def test_channels_that_are_not_packed_together_are_refused(program):  # noqa: F811
    result = TURBO(cached(program))
    assert result.rewrites == 0
    assert {r.why for r in result.refusals} >= {
        "keys of the cache kv have 16 channels, and turbo4 packs 32 together; choose int8"
    }
    result = TURBO(attention(Case(key_dim=64, value_dim=80)))
    assert [r.why for r in result.refusals] == [
        "values of the cache kv have 80 channels, and turbo3 packs 32 together; choose int8"
    ]


def test_values_are_rotated_once():
    with pytest.raises(InputError, match="rotate is for int4 values, and they are turbo3 here"):
        QuantizeKV(values="turbo3", rotate=True)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", RUNNABLE)
def test_every_instruction_set_looks_up_alike(isa):
    """Every index of every size of table, whatever lies above its bits."""
    given_, sizes = TABLE[isa], (4, 8, 16)
    for lanes in sorted({8, given_.lanes}):
        indices = tirx.decl_buffer((64,), "int32", "indices")
        out = tirx.decl_buffer((64 * len(sizes),), "float32", "out")
        with IRBuilder() as builder, parallel(1):
            for i, size in enumerate(sizes):
                table = [1.5 * n - 3 for n in range(size)]
                for at in range(0, 64, lanes):
                    found = given_.lookup(load(indices, at, lanes), table, lanes)
                    store(out, 64 * i + at, found, lanes)
        func = tirx.PrimFunc([indices, out], builder.get())
        func = func.with_attr({"global_symbol": "look_up", "tirx.noalias": True})
        numbers, got = array((64,), "int32"), array((64 * len(sizes),), "float32")
        numbers[:] = np.arange(64) - 32
        jit({"look_up": func}, given_)["look_up"](tensor(numbers), tensor(got))
        wanted = [1.5 * (numbers % size) - 3 for size in sizes]
        assert np.array_equal(got.reshape(3, 64), wanted)


CASES = {
    "turbo4 keys, turbo3 values": (TURBO, Case(heads=6, key_dim=64, value_dim=64, scale=0.125)),
    "turbo5 keys, turbo4 values": (
        QuantizeKV(keys="turbo5", values="turbo4"),
        Case(heads=4, kv_heads=2, key_dim=32, value_dim=96, softcap=5.0, sinks=True, window=70),
    ),
    "turbo3 keys, turbo5 values": (
        QuantizeKV(keys="turbo3", values="turbo5"),
        Case(key_dim=128, value_dim=32, scale=0.1),
    ),
    "int8 keys, turbo3 values": (QuantizeKV(keys="int8", values="turbo3"), Case(key_dim=7, value_dim=32)),
    "turbo4 keys": (QuantizeKV(keys="turbo4", values="keep"), Case(key_dim=32, value_dim=5)),
}


@pytest.mark.parametrize(
    "name",
    [name if at < 2 else pytest.param(name, marks=EXTENDED) for at, name in enumerate(CASES)],
)
def test_compiled_attention_gives_what_the_reference_gives_whatever_the_rows(name):
    quantise, case = CASES[name]
    made, text = Compiled(quantise(attention(case)).program), tokens(150)
    made.fill_caches(0x7E00)
    got = made.decode("target", text, 1)
    wanted = run(made.program, made.program.target, torch.tensor([text]))[0].numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6)  # sums in another order
    with threads(2):
        assert np.array_equal(made.decode("target", text, 10), got)


def bits_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bits [vectors, channels, bits] of codes, the lowest first."""
    return codes[..., None] >> np.arange(bits) & 1


@pytest.mark.parametrize("isa", [pytest.param(n, marks=EXTENDED) if n in REPEATED else n for n in RUNNABLE])
@pytest.mark.parametrize(("keys", "values"), [(5, 4), pytest.param(4, 3, marks=EXTENDED)])
def test_every_instruction_set_packs_alike(isa, keys, values):
    """Codes and scales, bit for bit, against those found one by one."""
    quantise = QuantizeKV(keys=f"turbo{keys}", values=f"turbo{values}")
    text = tokens(16)
    made = Compiled(quantise(attention(Case(heads=2, key_dim=32, value_dim=64, capacity=20))).program, isa)
    got = made.decode("target", text, 1)
    wanted = run(made.program, made.program.target, torch.tensor([text]))[0].numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6)
    for part, width, bits in (("k", 32, keys), ("v", 64, values)):
        x = made.program.weights[part][text].view(16, 2, width).transpose(0, 1)
        found, scales, margins = by_hand(x, bits)
        assert min(map(min, margins)) > 1e-6
        blocks = made.caches[f"kv_{part}"].reshape(2, made.pool, -1)[:, made.tables[0, 0]].view(np.uint8)
        of_scales = np.ascontiguousarray(blocks[:, -32:]).view(np.int16)
        assert np.array_equal(of_scales.ravel(), torch.tensor(scales).bfloat16().view(torch.int16).numpy())
        kept = blocks[:, :-32]
        if part == "k":
            kept = kept.reshape(2, -1, 16).transpose(0, 2, 1)
        kept = np.unpackbits(np.ascontiguousarray(kept).reshape(32, -1), axis=1, bitorder="little")
        index, codes = bits & ~1, bits_of(np.array(found), bits)
        of_index = codes[..., :index]
        if part == "v" and index == 4:  # of 16 channels the even ones are the first word
            of_index = of_index.reshape(32, -1, 8, 2, index).swapaxes(2, 3)
        joined = [of_index.reshape(32, -1), codes[..., index:].reshape(32, -1)]
        assert np.array_equal(kept, np.concatenate(joined, axis=1))


@pytest.mark.slow
@pytest.mark.extended
def test_a_draft_on_the_same_cache_changes_no_bit_of_the_target(rng):
    made = Compiled(TURBO(llama(32)).program)
    assert {c.dtype for c in made.program.caches.values()} == {"turbo4 keys, turbo3 values"}
    assert len(made.program.caches) == 1
    text = random_tokens(made.program, 24, rng)
    plain = made.decode("target", text, 1)
    made.fill_caches(0x7E00)
    got = []
    for start in range(0, 24, 4):
        for at in range(start, start + 3):
            made.feed("draft", [(text[at] + 1) % 83], at)
        got.append(made.feed("target", text[start : start + 4], start))
    assert np.array_equal(np.concatenate(got), plain)


# -- artifacts ---------------------------------------------------------------------------------------------------------


def compiled(folder: Path, steps: str) -> Path:
    """Compile the small model, its draft on the same cache, through some steps, for few numbers of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "PREFILL_ROWS", ())
        patch.setattr(library, "VERIFY_ROWS", (1, 4))
        made: Program = Pipeline.parse(steps)(llama(32))
        made.model = replace(made.model, eos_token_ids=())
        specqd.compile(made, folder, pipeline="fuse-rope")
    return folder


def test_speculation_and_shared_prefixes_change_no_token(tmp_path):
    folder = compiled(tmp_path / "made", str(TURBO))
    sharing, apart = specqd.load(folder, 1), specqd.load(folder, 1, prefix_sharing=False)
    for text in (prompt(0, 37), prompt(0, 37), prompt(0, 35) + prompt(1, 9)):
        plain = apart.generate(text, 40, plan="target")
        for plan in PLANS:
            one = sharing.generate(text, 40, plan=plan)
            assert one.tokens == plain.tokens
            demand_every_block(sharing.engine.tables)
        assert one.stats.reused_tokens == len(text) - 1  # the block in which they part is copied


@pytest.mark.parametrize("method", ["r-kv", pytest.param("kvcrush,scorer=h2o", marks=EXTENDED)])
def test_a_selection_in_the_target_works_as_without_and_drafts_change_nothing(method, tmp_path):
    selecting = f"select-kv{{method={method},tokens=48,above=48,every=32,sinks=2,recent=16}}"
    model = specqd.load(compiled(tmp_path / "made", f"{TURBO}, {selecting}"), 1)
    plain, drafted = (model.generate(prompt(0, 90), 60, plan=plan).tokens for plan in PLANS)
    assert len(plain) == 60 and drafted == plain

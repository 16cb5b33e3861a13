"""INT4 caches: what is packed, who reads it packed, and that no output depends on how a text was fed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accounting import demand_every_block
from compiled import EXTENDED, NATIVE, RUNNABLE, Compiled, llama, lowered, random_tokens, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codegen_attention import CASES, Case, attention, tokens
from test_passes_kv import program  # noqa: F401  (a fixture)
from test_quantize_kv import cached

import specqd
from specqd.artifact import open_artifact
from specqd.cache_formats import held, rotated, rotated_back
from specqd.codegen import library
from specqd.codegen.lower.attending import movers
from specqd.errors import CodegenError, ContractError, InputError
from specqd.manifest import BLOCK
from specqd.passes import Pipeline
from specqd.passes.kv.quantize import QuantizeKV
from specqd.planning.recording import record
from specqd.program import KVCache, Program
from specqd.reference import new_caches, run
from specqd.runtime.engine import Engine

INT4 = QuantizeKV(keys="int4", values="int4")
CHOICES = {
    "int4": INT4,
    "int4, 32 recent": QuantizeKV(keys="int4", values="int4", recent=32),
    "int4, rotated": QuantizeKV(keys="int4", values="int4", rotate=True),
    "int4 keys, int8 values": QuantizeKV(keys="int4", values="int8"),
    "int4 keys": QuantizeKV(keys="int4", values="keep"),
    "int8 keys, int4 values": QuantizeKV(keys="int8", values="int4"),
    "turbo, 32 recent": QuantizeKV(keys="turbo4", values="turbo3", recent=32),
    "int4 keys, turbo values": QuantizeKV(keys="int4", values="turbo3"),
    "int8, 16 recent": QuantizeKV(keys="int8", values="int8", recent=16),
}


# -- what is given back ------------------------------------------------------------------------------------------------


def asymmetric(x: np.ndarray) -> tuple[np.ndarray, np.float64, np.float64]:
    """Integers, scale and zero point of a few BF16 numbers that are rounded together, in float64."""
    low, high = float(x.min()), float(x.max())
    scale = torch.tensor(np.float32(np.float32(high - low) / np.float32(15))).clamp(min=2.0**-126)
    scale = float(scale.bfloat16())
    return np.round((x.astype(np.float64) - low) / scale), np.float64(scale), np.float64(low)


@settings(deadline=None, max_examples=40)
@given(
    exponent=st.integers(-60, 60),
    shift=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
    length=st.integers(1, 40),
)
def test_int4_gives_back_the_nearest_of_16_steps_between_least_and_largest(exponent, shift, seed, length):
    """Keys by channel over 16 positions, values by position, against a loop over each group."""
    x = torch.randn(2, length, 6, generator=torch.Generator().manual_seed(seed)) + shift
    x = (x * 2.0**exponent).bfloat16().float()
    for keys in (True, False):
        got = held(x, "int4", keys=keys).double().numpy()
        groups = [
            (h, slice(b, b + BLOCK), c) if keys else (h, b, slice(None))
            for h in range(2)
            for b in range(0, length, BLOCK if keys else 1)
            for c in (range(6) if keys else (0,))
        ]
        for where in groups:
            _, scale, low = asymmetric(x.numpy()[where])
            # Float32 rounds what is given back, and a quotient beside a half to either side of it.
            error = np.abs(got[where]) * 2.0**-23 + scale * 1e-5
            steps = np.round((got[where] - low) / scale)
            assert (np.abs(got[where] - (steps * scale + low)) <= error).all()
            assert (np.abs(x.numpy()[where] - (steps * scale + low)) <= scale / 2 + error).all()
            assert steps.min() >= 0 and steps.max() <= 15


def test_int4_keeps_what_is_equal_and_what_is_on_its_grid():
    for keys in (True, False):
        assert torch.equal(
            held(torch.full((3, 16, 8), 0.7).bfloat16().float(), "int4", keys=keys)[0, 0, 0],
            torch.tensor(0.7).bfloat16().float(),
        )
        grid = torch.arange(16.0) * 0.25 - 3
        x = (grid[:, None] if keys else grid).expand(2, 16, 16)
        assert torch.equal(held(x, "int4", keys=keys), x)


@pytest.mark.parametrize(("channels", "size"), [(8, 8), (64, 64), (80, 16), (96, 32), (128, 128)])
def test_a_rotation_spreads_each_channel_evenly_and_can_be_undone(channels, size):
    matrix = rotated(torch.eye(channels))
    assert torch.equal(matrix.abs() > 0, torch.block_diag(*[torch.ones(size, size)] * (channels // size)) > 0)
    assert matrix[matrix != 0].abs().unique().numel() == 1
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels), rtol=0, atol=1e-6)
    x = torch.randn(3, 5, channels, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotated_back(rotated(x)), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated(x), x @ matrix, rtol=0, atol=1e-5)


def test_the_signs_of_a_rotation_are_mixed_and_always_the_same():
    first = rotated(torch.eye(128))[:, 0]  # where the Hadamard transform itself has no minus
    assert 40 < int((first < 0).sum()) < 88
    assert torch.equal(first, rotated(torch.eye(128))[:, 0])


# -- the pass ----------------------------------------------------------------------------------------------------------


def test_caches_and_attention_say_what_they_round_to_and_from_where(program):  # noqa: F811
    before = cached(program)
    made = QuantizeKV(keys="int4", values="int4", recent=32)(before).program
    assert {(c.key_dtype, c.value_dtype, c.recent) for c in made.caches.values()} == {("int4", "int4", 32)}
    calls = [n for n in made.target.graph.nodes if n.name.startswith("cached")]
    assert [n.args[11:] for n in calls] == [("int4", "int4", None, 32, False)] * 3
    plain = [n.args[11:] for n in INT4(before).program.target.graph.nodes if n.name.startswith("cached")]
    assert plain == [("int4", "int4", None, 0, False)] * 3
    turned = QuantizeKV(values="int4", rotate=True)(before)
    assert [c.rotated for c in turned.program.caches.values()] == [
        c.value_dim % 8 == 0 for c in before.caches.values()
    ]
    assert all("and a Hadamard transform needs a multiple of 8" in r.why for r in turned.refusals)
    again = INT4(made)
    assert again.rewrites == 0 and again.program.caches == made.caches
    assert {r.why.split(":")[0] for r in again.refusals} == {
        "the cache kv is quantised already", "the cache kv2 is quantised already",
    }  # fmt: skip
    broken = made.copy()
    broken.caches["kv"] = replace(broken.caches["kv"], recent=16)
    with pytest.raises(
        ContractError, match="keeps other positions of the cache kv in BF16, or rotates otherwise"
    ):
        QuantizeKV()(broken)


def test_a_cache_says_how_many_bytes_it_takes():
    plain = KVCache("kv", 3, 2, 64, 64, 100)
    # 4 bits and 4 bytes for 16 numbers of a key's channel, 4 bits and 4 bytes for a value.
    assert replace(plain, key_dtype="int4", value_dtype="int4").bytes == 3 * 2 * 100 * (48 + 36)
    assert not plain.whole_blocks and replace(plain, value_dtype="int4", recent=0).whole_blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent": 8, "keys": "int4"}, "8 recent positions are no whole blocks: give a multiple of 16"),
        ({"recent": -16, "keys": "int4"}, "-16 recent positions are no whole blocks"),
        (
            {"recent": 16, "keys": "keep", "values": "keep"},
            "recent=16 is for what is rounded, and nothing is",
        ),
        ({"keys": "int4", "rotate": True}, "rotate is for int4 values, and they are int8 here"),
    ],
)
def test_recent_positions_are_whole_blocks_of_int4(options, message):
    with pytest.raises(InputError, match=message):
        QuantizeKV(**options)


def test_selections_and_packed_blocks_refuse_each_other():
    selected = Pipeline.parse("draft: select-kv{tokens=128}")(llama())
    refused = INT4(selected)
    assert refused.rewrites == 0
    assert "are selected for draft, and int4 or recent positions round whole" in refused.refusals[0].why
    for step in ("select-kv{tokens=128}", "draft: select-kv{tokens=128}"):
        made = Pipeline.parse(step)(INT4(llama()).program)
        assert made.selection is None
        (_, why), *_ = made.history[-1].refused
        assert why.startswith("the cache kv (int4) rounds whole blocks") and "int8" in why


# -- the reference -----------------------------------------------------------------------------------------------------


def attended(made: Program, case: Case, text: list[int], recent: int) -> np.ndarray:
    """Attention one query and head at a time, every key and value taken packed or not by the distance of blocks."""
    formats = {n: (made.caches["kv"].key_dtype, made.caches["kv"].value_dtype)["kv".index(n)] for n in "kv"}
    dims = {
        "q": (case.heads, case.key_dim),
        "k": (case.kv_heads, case.key_dim),
        "v": (case.kv_heads, case.value_dim),
    }
    q, k, v = (made.weights[n][text].view(len(text), *dims[n]).transpose(0, 1) for n in "qkv")
    plain, packed = {}, {}
    for name, x in (("k", k), ("v", v)):
        if formats[name].startswith("turbo"):  # lies rotated in BF16 too
            plain[name] = rotated_back(rotated(x).bfloat16().float())
        else:
            plain[name] = x.bfloat16().float()
        packed[name] = held(plain[name], formats[name], keys=name == "k")
    out = np.zeros((len(text), case.heads, case.value_dim))
    for at in range(len(text)):
        old = [at // BLOCK - p // BLOCK > recent // BLOCK for p in range(at + 1)]
        keys, values = (
            torch.where(torch.tensor(old)[:, None], packed[n][:, : at + 1], plain[n][:, : at + 1])
            .double()
            .numpy()
            for n in "kv"
        )
        for head in range(case.heads):
            of = head // (case.heads // case.kv_heads)
            scores = keys[of] @ q[head, at].double().numpy() * case.scale
            weights = np.exp(scores - scores.max())
            out[at, head] = weights / weights.sum() @ values[of]
    return out.reshape(len(text), -1)


@pytest.mark.parametrize(
    ("keys", "values", "recent"),
    [
        ("int4", "int4", 0),
        ("int4", "int4", 32),
        ("turbo4", "turbo3", 32),
        ("int4", "turbo5", 0),
        ("int8", "int8", 16),
    ],
)
def test_the_reference_reads_each_position_by_the_distance_of_blocks(keys, values, recent):
    narrow = Case(key_dim=8, value_dim=6, capacity=100)
    case = Case(key_dim=32, value_dim=32, capacity=100, scale=0.2) if "turbo" in keys + values else narrow
    made = QuantizeKV(keys=keys, values=values, recent=recent)(attention(case)).program
    text = tokens(100)
    got = run(made, made.target, torch.tensor([text]))[0].numpy()
    np.testing.assert_allclose(got, attended(made, case, text, recent), rtol=0, atol=4e-6)


def test_values_of_float32_stay_what_they_are_beside_int4_keys():
    case = Case(key_dim=8, value_dim=6, capacity=40)
    plain = attention(case)
    plain.caches["kv"] = replace(plain.caches["kv"], value_dtype="float32")
    made = QuantizeKV(keys="int4", values="keep")(plain).program
    text = tokens(40)
    caches = new_caches(made)
    run(made, made.target, torch.tensor([text]), caches=caches)
    values = made.weights["v"][text].view(40, case.kv_heads, case.value_dim).transpose(0, 1)
    assert torch.equal(caches["kv_v"][0], values)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("group of 8, heads of 64", "int4"),
        pytest.param("all at once", "int4, 32 recent", marks=EXTENDED),
        ("wide values, odd capacity", "int4, rotated"),
        ("odd heads", "int8 keys, int4 values"),
        ("group of 8, heads of 64", "turbo, 32 recent"),
        pytest.param("group of 8, heads of 64", "int4 keys, turbo values", marks=EXTENDED),
        pytest.param("odd heads", "int8, 16 recent", marks=EXTENDED),
        pytest.param("group of 3, heads of 12", "int4 keys, int8 values", marks=EXTENDED),
        pytest.param("sees itself only", "int4 keys", marks=EXTENDED),
    ],
)
def test_compiled_attention_gives_what_the_reference_gives_whatever_the_rows(name, choice):
    made = Compiled(CHOICES[choice](attention(CASES[name])).program)
    text = tokens()
    made.fill_caches(0x7E00)
    got = made.decode("target", text, 1)
    wanted = run(made.program, made.program.target, torch.tensor([text]))[0].numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6)  # sums in another order
    made.fill_caches(0x7F7F)
    with threads(2):
        assert np.array_equal(made.decode("target", text, 25), got)


@pytest.mark.parametrize("isa", RUNNABLE)
def test_every_instruction_set_packs_alike(isa):
    """Integers, scales and zero points of a block, wherever they lie, against a loop over its groups."""
    case = Case(key_dim=7, value_dim=37, capacity=40)
    made = Compiled(INT4(attention(case)).program, isa)
    made.decode("target", tokens(36), 4)
    for part, width in (("k", 7), ("v", 37)):
        x = (
            made.program.weights[part][tokens(16)]
            .view(16, 2, width)
            .transpose(0, 1)
            .bfloat16()
            .float()
            .numpy()
        )
        block = made.caches[f"kv_{part}"].reshape(2, made.pool, -1)[:, made.tables[0, 0]]
        numbers, words = (block[:, :16], block[:, 16:]) if part == "k" else (block[:, :128], block[:, 128:])
        numbers = np.ascontiguousarray(numbers).view(np.uint8)
        halves = np.stack([numbers & 15, numbers >> 4])
        if part == "k":  # [pairs][16] in each half
            integers = halves.reshape(2, 2, 4, 16).transpose(1, 3, 2, 0).reshape(2, 16, 8)[:, :, :7]
            groups = [(slice(None), c) for c in range(7)]
        else:  # [16][spans][16] in each half
            integers = halves.reshape(2, 2, 16, 2, 16).transpose(1, 2, 3, 0, 4).reshape(2, 16, 64)[:, :, :37]
            groups = [(p, slice(None)) for p in range(16)]
        for head in range(2):
            for at, where in enumerate(groups):
                wanted, scale, low = asymmetric(x[head][where])
                near = np.abs(integers[head][where] - wanted)
                assert (
                    near.max() <= 1 and (near == 0).mean() > 0.9
                )  # float32 may see the other side of a half
                word = int(words[head, at]) & 0xFFFFFFFF
                kept = np.array([word << 16 & 0xFFFFFFFF, word & 0xFFFF0000], np.uint32).view(np.float32)
                assert kept.tolist() == [scale, low]


@pytest.fixture(
    scope="module",
    params=[
        "int4",
        pytest.param("int4, 32 recent", marks=EXTENDED),
        pytest.param("turbo, 32 recent", marks=EXTENDED),
    ],
)
def fed(request) -> tuple[Compiled, list[int], np.ndarray]:
    """A small model, a text, and the model's logits when that is fed one position at a time."""
    made = Compiled(CHOICES[request.param](llama(32 if "turbo" in request.param else 12)).program)
    text = random_tokens(made.program, 160, torch.Generator().manual_seed(3))
    return made, text, made.decode("target", text, 1)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_no_logits_depend_on_how_a_text_was_fed(fed, data):
    """Passes of any size, and others that go on into later blocks with other tokens and are rolled back."""
    made, text, wanted = fed
    made.fill_caches(0x7E00)
    sequence, at = data.draw(st.integers(0, 2)), 0
    while at < len(text):
        rows = min(data.draw(st.sampled_from([1, 4, 16])), len(text) - at)
        rows = max(size for size in (1, 4, 16) if size <= rows)
        for wrong in data.draw(st.lists(st.integers(1, 9), max_size=1)):  # as drafts that do not stand
            for ahead in range(at, min(at + 20, len(text) - rows), rows):
                drafts = [(token + wrong) % 83 for token in text[ahead : ahead + rows]]
                made.feed("target", drafts, ahead, sequence=sequence)
        got = made.feed("target", text[at : at + rows], at, sequence=sequence)
        assert np.array_equal(got, wanted[at : at + rows]), f"{rows} rows at {at}"
        at += rows


@pytest.mark.slow
@pytest.mark.extended
def test_long_passes_at_every_offset_of_a_block(fed):
    """What the recent blocks must hold at once: 128 rows that begin anywhere in a block."""
    made, text, wanted = fed
    with threads(2):
        for start in (0, 1, 15, 16, 31):
            made.fill_caches(0x7E00)
            for at in range(start):
                made.feed("target", [text[at]], at)
            got = made.feed("target", text[start : start + 128], start, last_only=True)
            assert np.array_equal(got[0], wanted[start + 127])
            assert np.array_equal(
                made.feed("target", [text[start + 128]], start + 128)[0], wanted[start + 128]
            )


def test_rows_of_several_sequences_in_one_pass(fed):
    made, text, wanted = fed
    made.fill_caches(0x7E00)
    starts = [(0, 15), (2, 46)]
    for sequence, start in starts:
        for at in range(start):
            made.feed("target", [text[at]], at, sequence=sequence)
    for step in range(0, 8, 2):
        rows = [(text[s + step + i], s + step + i, sequence) for sequence, s in starts for i in range(2)]
        if step == 6:
            rows[3] = rows[2]  # as the runtime fills a pass up
        got = made.feed_rows("target", rows)
        assert np.array_equal(got, wanted[[position for _, position, _ in rows]])


# -- artifacts ---------------------------------------------------------------------------------------------------------

PLANS = ["target", "target <- draft@fixed:3"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[int, Path]:
    """The small model with its draft in one packed cache, without recent positions and with 16."""
    folder, made = tmp_path_factory.mktemp("int4"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "PREFILL_ROWS", ())
        for recent, rows in ((0, (1, 4)), (16, (1,))):
            patch.setattr(library, "VERIFY_ROWS", rows)
            small = QuantizeKV(keys="int4", values="int4", recent=recent)(llama()).program
            small.model = replace(small.model, eos_token_ids=())
            made[recent] = folder / str(recent)
            specqd.compile(small, made[recent], pipeline="fuse-rope")
    return made


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 17 + i * i) % 83 for i in range(length)]


def test_speculation_and_shared_prefixes_change_no_token(artifacts):
    sharing, apart = specqd.load(artifacts[0], 1), specqd.load(artifacts[0], 1, prefix_sharing=False)
    for text in (prompt(0, 37), prompt(0, 37), prompt(0, 33) + prompt(1, 9), prompt(0, 32), prompt(0, 90)):
        plain = apart.generate(text, 40, plan="target")
        for plan in PLANS:
            one = sharing.generate(text, 40, plan=plan)
            assert one.tokens == plain.tokens
            assert one.stats.reused_tokens % BLOCK == 0
            demand_every_block(sharing.engine.tables)
        assert one.stats.reused_tokens == (len(text) - 1) // BLOCK * BLOCK
    many = specqd.load(artifacts[0], 1, sequences=3)
    texts = [prompt(0, 37), prompt(1, 20), prompt(0, 33) + prompt(1, 9), prompt(2, 50)]
    together = many.generate_many(texts, 30)
    assert [one.tokens for one in together] == [apart.generate(t, 30, plan="target").tokens for t in texts]
    demand_every_block(many.engine.tables)


def test_recent_positions_turn_sharing_off(artifacts):
    model = specqd.load(artifacts[16], 1)
    assert not model.engine.prefix_sharing and specqd.load(artifacts[0], 1).engine.prefix_sharing
    once, again = (model.generate(prompt(0, 37), 60, speculate=False) for _ in range(2))
    assert once.tokens == again.tokens and not again.stats.reused_tokens


def test_the_manifest_says_what_is_packed_and_how_much_it_takes(artifacts):
    manifest = open_artifact(artifacts[16]).manifest
    cache = manifest.caches["kv"]
    assert (cache.key_dtype, cache.value_dtype, cache.recent) == ("int4", "int4", 16)
    # Two planes of 12 channels, in words: 6 pairs of 4 and 2, and 16 positions of 4 and 1.
    assert manifest.sizes("cache") == {"kv_k": 2 * 36 * 4, "kv_v": 2 * 80 * 4}
    # Ten blocks of BF16: 16 before, the one that is written, and 8 of the longest pass.
    assert manifest.sizes("recent") == {"kv_recent_k": 2 * 10 * 16 * 24, "kv_recent_v": 2 * 10 * 16 * 24}
    assert manifest.memory >= manifest.cache_bytes(168) + manifest.recent_bytes
    with pytest.raises(InputError, match=r"beside 0\.0154 MB for recent blocks of each sequence"):
        specqd.load(artifacts[16], 1, cache_mb=0.016)
    # Two sequences have 30720 bytes of recent blocks, and a block of the cache takes 928.
    assert specqd.load(artifacts[16], 1, sequences=2, cache_mb=0.0308 + 0.005).engine.tables.pool == 5


def test_what_was_packed_is_fed_again_from_where_all_that_is_read_is_there(artifacts):
    text = prompt(0, 168)
    first = {}
    for recent, wanted in ((0, {40: 40, 17: 16, 5: 0}), (16, {40: 40, 17: 0, 5: 0})):
        engine = Engine.open(artifacts[recent], 1)
        first[recent] = [int(engine.feed("target", [token], at).next[0]) for at, token in enumerate(text)]
        for entry in ("target", "draft"):  # which share the cache
            assert {at: engine.recent.reached(entry, 0, at) for at in wanted} == wanted
        back = wanted[17]
        with pytest.raises(InputError, match=rf"position 17 cannot be fed here.*from position {back} on"):
            engine.feed("target", [text[17]], 17)
        again = [int(engine.feed("target", [text[at]], at).next[0]) for at in range(back, 30)]
        assert again == first[recent][back:30]
        engine.recent.forget(0)  # as who measures time does
        engine.feed("target", [text[17]], 17)


@pytest.mark.parametrize("choice", CHOICES)
def test_who_receives_attention_is_told_by_an_observer_alone(choice):
    """The weights that slots get take as long to compute as attention, so that no other pass may."""
    made = lowered(CHOICES[choice](attention(Case(key_dim=8, value_dim=8))).program, "target", 1)
    assert "received" not in {p.kind for p in made.parameters}


def test_positions_of_keys_that_are_rounded_together_are_not_moved():
    with pytest.raises(CodegenError, match="INT4Keys rounds the positions of a block together"):
        movers(INT4(attention(Case(key_dim=8, value_dim=8))).program, NATIVE)


def test_a_pass_that_recent_blocks_cannot_hold_is_refused():
    with pytest.raises(CodegenError, match="129 rows does not fit into the recent blocks of the cache kv"):
        lowered(INT4(attention(Case(key_dim=8, value_dim=8))).program, "target", 129)


def test_a_recording_goes_back_to_blocks_that_were_packed(artifacts):
    text = prompt(0, 165)
    runs = record(Engine.open(artifacts[0], 1), text[:5], text[5:], ["draft"]).runs["draft"]
    for n in (6, 17, 20, 33, 100):
        engine, said = Engine.open(artifacts[0], 1), list[int]()
        for at in range(n):
            engine.feed("target", [text[at]], at)
        for at in range(n - 1, n - 1 + len(runs[n].tokens)):
            said.append(engine.feed("draft", [said[-1] if said else text[at]], at).token(0))
        assert tuple(said) == runs[n].tokens

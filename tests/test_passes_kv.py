"""insert-kv-cache and share-kv: what a cache must never change, and who may share one."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import DIM, LENGTH, VOCAB, Decoder, logits, names, of, ops
from torch import nn
from torch.testing import assert_close

from specqd.errors import ContractError, InputError
from specqd.passes.kv.insert import InsertKVCache
from specqd.passes.speculate.derive import DeriveDraft
from specqd.passes.speculate.share_kv import ShareKV
from specqd.program import KVCache
from specqd.reference import new_caches, run

attention = torch.ops.specqd.causal_attention


def attend(q, k, v, heads, kv_heads, layer, window=0):
    """Attention with `heads` queries to `kv_heads` keys, on the channels of q, k and v `[1, S, channels]`."""
    q, k, v = (
        x.view(1, x.shape[1], n, -1).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    return attention(q, k, v, 0.3, layer, window, 0.0, None).flatten(2)


def layers(m, x, _):
    """Two layers of one shape, the second with a window, around one whose values are narrower."""
    x = x + attend(m.q(x), m.k(x), m.k(x * 0.5), 4, 2, 0)
    x = x + m.up(attend(m.q(x), m.k(x), m.k(x)[..., :16], 4, 2, 1))
    return x + attend(m.q(x * 0.7), m.k(x), m.k(x + 1), 4, 2, 2, window=3)


@pytest.fixture(scope="module")
def program():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"q": nn.Linear(DIM, DIM), "k": nn.Linear(DIM, DIM // 2), "up": nn.Linear(DIM // 2, DIM)}
        return of(Decoder(layers, **parts))


def test_layers_of_one_shape_share_a_cache(program):
    result = InsertKVCache(capacity=32)(program)
    assert result.rewrites == 3 and not result.refusals
    assert names(result.program) == ["tokens", "positions", "kv_k", "kv_v", "kv2_k", "kv2_v"]
    assert result.program.caches == {
        "kv": KVCache("kv", 2, 2, 16, 16, 32),
        "kv2": KVCache("kv2", 1, 2, 16, 8, 32),
    }
    calls = [n for n in result.program.target.graph.nodes if n.name.startswith("cached")]
    assert [(str(n.args[3]), n.args[7], n.args[8]) for n in calls] == [
        ("kv_k", 0, 0), ("kv2_k", 0, 0), ("kv_k", 1, 3),
    ]  # fmt: skip
    swapped = [name.replace("causal", "cached") for name in ops(program)]
    assert ops(result.program) == swapped


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1)))
def test_any_split_of_a_sequence_gives_the_stateless_logits(program, cuts):
    """With a float32 cache nothing is rounded, so only the order of sums over the row count differs."""
    cached = InsertKVCache(capacity=LENGTH, dtype="float32")(program).program
    tokens, caches = torch.arange(LENGTH)[None] % VOCAB, new_caches(cached)
    ends = [*sorted(cuts), LENGTH]
    rows = [
        run(cached, cached.target, tokens[:, a:b], torch.arange(a, b)[None], caches=caches)
        for a, b in zip([0, *ends], ends, strict=False)
    ]
    assert_close(torch.cat(rows, 1), logits(program), rtol=1e-5, atol=1e-5)


def test_what_lies_beyond_a_position_is_overwritten_and_never_read(program):
    cached = InsertKVCache(capacity=LENGTH, dtype="float32")(program).program
    caches = new_caches(cached)
    tokens = torch.arange(LENGTH)[None] % VOCAB
    run(cached, cached.target, torch.full((1, LENGTH), 3), caches=caches)  # rejected guesses in every slot
    assert_close(run(cached, cached.target, tokens, caches=caches), logits(program), rtol=1e-5, atol=1e-5)


def test_a_bfloat16_cache_rounds_and_says_so(program):
    rounding, exact = InsertKVCache(), InsertKVCache(dtype="float32")
    assert not rounding.lossless and exact.lossless
    after = rounding(program).program
    assert after.caches["kv"].dtype == "bfloat16"
    error = (logits(after) - logits(program)).abs().max()
    assert 0 < error < 2e-2  # 8 bits of mantissa on keys and values near 1


@pytest.mark.parametrize(("asked", "got"), [(0, 64), (7, 7), (64, 64)])
def test_capacity_is_as_asked_or_what_the_model_was_made_for(program, asked, got):
    assert InsertKVCache(capacity=asked)(program).program.caches["kv"].capacity == got


def test_a_capacity_beyond_the_model_is_an_error_with_both_numbers(program):
    with pytest.raises(InputError, match=r"a capacity of 65 is more than the 64 positions"):
        InsertKVCache(capacity=65)(program)
    with pytest.raises(InputError, match=r"the capacity is -1; give at least 1"):
        InsertKVCache(capacity=-1)


def test_inputs_in_another_order_break_the_contract(program):
    program = program.copy()
    next(iter(program.target.graph.nodes)).target = "ids"
    with pytest.raises(ContractError, match="before the pass, the inputs begin with ids, positions"):
        InsertKVCache()(program)


def test_a_second_insertion_changes_nothing(program):
    once = InsertKVCache()(program).program
    again = InsertKVCache()(once)
    assert again.rewrites == 0 and again.program.caches == once.caches


def test_a_draft_has_a_cache_of_its_own_until_it_shares(program):
    derived = DeriveDraft()(InsertKVCache(capacity=16)(program).program).program
    assert names(derived, "draft")[2:] == ["draft_kv_k", "draft_kv_v", "draft_kv2_k", "draft_kv2_v"]
    assert set(derived.caches) == {"kv", "kv2", "draft_kv", "draft_kv2"}
    result = ShareKV()(derived, "draft")
    assert result.rewrites == 4 and not result.refusals
    assert names(result.program, "draft") == names(result.program, "target")
    assert set(result.program.caches) == {"kv", "kv2"}
    assert torch.equal(logits(result.program, "draft"), logits(result.program, "target"))


def test_a_shared_draft_continues_where_the_target_stopped(program):
    pipeline = (InsertKVCache(dtype="float32"), DeriveDraft())
    for step in pipeline:
        program = step(program).program
    shared = ShareKV()(program, "draft").program
    tokens, caches = torch.arange(LENGTH)[None] % VOCAB, new_caches(shared)
    run(shared, shared.target, tokens[:, :6], torch.arange(6)[None], caches=caches)
    rest = run(shared, shared.entries["draft"], tokens[:, 6:], torch.arange(6, LENGTH)[None], caches=caches)
    assert_close(rest, logits(program)[:, 6:], rtol=1e-5, atol=1e-5)


def test_both_entries_get_caches_when_the_draft_is_derived_first(program):
    derived = DeriveDraft()(program).program
    for entry in ("target", "draft"):
        derived = InsertKVCache()(derived, entry).program
    assert set(derived.caches) == {"kv", "kv2", "draft_kv", "draft_kv2"}
    assert ShareKV()(derived, "draft").rewrites == 4


def test_who_may_not_share_is_told_why(program):
    bare = DeriveDraft()(program).program
    cached = DeriveDraft()(InsertKVCache(capacity=16)(program).program).program

    def reasons(program, entry="draft"):
        result = ShareKV()(program, entry)
        assert result.rewrites == 0
        return [r.why for r in result.refusals]

    assert reasons(cached, "target") == ["this is the target, whose cache the others share"]
    assert reasons(bare) == ["draft has no cache to share; put insert-kv-cache first"]
    shared = ShareKV()(cached, "draft").program
    assert reasons(shared) == [
        "the cache kv is the target's already",
        "the cache kv2 is the target's already",
    ]
    stranger = cached.copy()
    stranger.entries["draft"].derived_from = None
    assert reasons(stranger) == [
        "draft is not derived from the target, so keys and values mean something else in it"
    ]
    smaller = cached.copy()
    for name in ("draft_kv", "draft_kv2"):
        smaller.caches[name] = dataclasses.replace(smaller.caches[name], capacity=8)
    assert reasons(smaller)[0] == (
        "the target has no free cache of the shape of draft_kv (2 layers x 2 heads x 8 x 16+16, bfloat16); "
        "it has kv (2 layers x 2 heads x 16 x 16+16, bfloat16), kv2 (1 layers x 2 heads x 16 x 16+8, "
        "bfloat16)"
    )


def test_deriving_copies_everything_but_the_weights(program):
    result = DeriveDraft(entry="small")(program)
    after = result.program
    assert result.rewrites == 1
    assert after.chain == ("target", "small") and after.entries["small"].derived_from == "target"
    assert after.weights.keys() == program.weights.keys()
    assert ops(after, "small") == ops(program)
    assert torch.equal(logits(after, "small"), logits(program))
    assert after.entries["small"].graph is not after.target.graph


def test_a_name_in_use_is_refused_and_an_unusable_one_is_an_error(program):
    once = DeriveDraft()(program).program
    again = DeriveDraft()(once)
    assert again.rewrites == 0 and again.program.chain == once.chain
    assert [r.why for r in again.refusals] == [
        "the program has an entry 'draft' already; choose another name"
    ]
    with pytest.raises(InputError, match="'my draft' cannot name an entry"):
        DeriveDraft(entry="my draft")


def test_a_draft_of_a_draft_is_named_after_itself(program):
    one = DeriveDraft()(InsertKVCache()(program).program).program
    two = DeriveDraft(entry="tiny")(one, "draft").program
    assert names(two, "tiny")[2:4] == ["tiny_kv_k", "tiny_kv_v"]
    assert two.entries["tiny"].derived_from == "draft" and two.chain == ("target", "draft", "tiny")
    assert ShareKV()(two, "tiny").rewrites == 4


def test_the_reference_is_given_caches_once(program):
    made = InsertKVCache(capacity=16)(program).program
    tokens, caches = torch.zeros(1, 3, dtype=torch.int64), new_caches(made)
    with pytest.raises(TypeError, match="multiple values for argument 'caches'"):
        run(made, made.target, tokens, None, new_caches(made), caches=caches)
    with pytest.raises(TypeError, match="positional arguments"):
        run(made, made.target, tokens, None, caches, caches)

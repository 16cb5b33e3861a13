"""What every selection method promises, budgets, and refusals."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import ALL, HEADS, METHODS, observed

from specqd.errors import InputError
from specqd.selection import Budget, Method, Observed, Uniform, compact, keep, layer_budgets, method
from specqd.selection.method import best

METHOD = pytest.mark.parametrize("chosen", ALL, ids=str)


@METHOD
@settings(max_examples=15, deadline=None)
@given(st.integers(12, 90), st.integers(0, 4), st.integers(8, 12), st.integers(0, 70), st.integers(0, 9))
def test_kept_slots_keep_the_promises(chosen, length, sinks, recent, more, seed):
    seen = observed(length, seed)
    budget = sinks + recent + more
    slots = keep(chosen, seen, budget, sinks=sinks, recent=recent)
    assert slots.dtype == np.int32 and slots.shape == (HEADS, min(budget, length))
    assert (np.diff(slots) > 0).all(), "ascending, so none twice"
    always = {*range(min(sinks, length)), *range(max(0, length - recent), length)}
    assert all(always <= set(head) for head in slots.tolist())
    assert (keep(chosen, seen, budget, sinks=sinks, recent=recent) == slots).all()


@METHOD
def test_scores_are_float32_of_every_token(chosen):
    scores = chosen.score(observed(40))
    assert scores.dtype == np.float32 and scores.shape == (HEADS, 40) and np.isfinite(scores).all()


@METHOD
def test_what_a_method_does_not_need_is_not_asked_for(chosen):
    seen = observed(40)
    asked = replace(
        seen,
        window=1 if "newest" in chosen.needs else seen.window,
        measured=next((getattr(seen, need) for need in ("received", "newest") if need in chosen.needs), None),
        **{
            name: getattr(seen, name) if name in chosen.needs else None
            for name in ("keys", "values", "queries", "rope")
        },
    )
    np.testing.assert_array_equal(keep(chosen, asked, 30, recent=8), keep(chosen, seen, 30, recent=8))


@pytest.mark.parametrize(
    ("name", "lacking"), [(name, lacking) for name in METHODS for lacking in method(name).needs]
)
def test_what_a_method_needs_is_asked_for(name, lacking):
    lost = ("keys", "queries") if lacking in ("received", "newest") else (lacking,)
    seen = replace(observed(60), **dict.fromkeys(lost))
    with pytest.raises(InputError, match=f"layer 0: {name} needs the "):
        keep(method(name), seen, 50)


def test_the_newest_query_is_not_known_from_what_a_window_received():
    seen = observed(60)
    several = replace(seen, keys=None, queries=None, measured=seen.received)
    with pytest.raises(InputError, match="tova needs the attention of the newest query alone"):
        keep(method("tova"), several, 50)


def test_a_model_without_rope_is_named_as_the_reason():
    with pytest.raises(InputError, match="a model without RoPE has none"):
        keep(method("expected-attention"), replace(observed(60), rope=None), 50)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "key-diff", "tova"])
def test_of_equal_scores_the_first_slots_stay(name):
    flat = np.ones((2, 40, 16), np.float32)
    positions = np.tile(np.arange(40, dtype=np.int32), (2, 1))
    alike = Observed(positions, keys=flat, queries=np.ones((2, 1, 1, 16), np.float32))
    slots = keep(method(name), alike, 12, sinks=2, recent=4)
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 39]
    assert slots.tolist() == [expected, expected]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([math.nan, -math.inf, -1.0, 0.0, 2.0, math.inf]), min_size=1), st.integers(0, 12)
)
def test_the_best_are_the_largest_whatever_the_scores(row, count):
    """A model may overflow: its scores say little then, but there are as many slots to keep as ever."""
    order = sorted(
        range(len(row)), key=lambda at: -math.inf if math.isnan(row[at]) else row[at], reverse=True
    )
    chosen = best(np.array([row, row[::-1]], np.float32), count)
    assert chosen.dtype == np.int32
    assert chosen[0].tolist() == sorted(order[:count])


def test_the_running_sum_of_h2o_equals_that_of_one_selection_of_both():
    first, second = observed(30, 1), observed(30, 2)
    heavy = method("h2o")
    slots = keep(heavy, first, 20, recent=8)
    carried = compact(heavy.carry(first), slots)
    later = replace(second, measured=compact(second.received, slots), keys=None, values=None, queries=None,
                    positions=slots, carried=carried)  # fmt: skip
    both = compact(first.received + second.received, slots)
    np.testing.assert_array_equal(heavy.score(later), both)
    assert heavy.carry(later).shape == slots.shape


def test_lots_are_drawn_once_a_position():
    uniform = Uniform(seed=3)
    long, short = uniform.score(observed(50)), uniform.score(observed(30))
    np.testing.assert_array_equal(long[:, :30], short)
    slots = keep(uniform, observed(30), 20, recent=8)
    kept = replace(observed(20), positions=slots)
    np.testing.assert_array_equal(uniform.score(kept), compact(short, slots))


def test_random_is_uniform_and_follows_its_seed():
    seen = observed(100)
    runs = [keep(Uniform(seed=seed), seen, 50, sinks=0, recent=0) for seed in range(200)]
    counts = sum(np.bincount(run[0], minlength=100) for run in runs)
    # Binomial(200, 1/2): five standard deviations are 35.
    assert abs(counts - 100).max() < 36
    assert any((runs[0] != run).any() for run in runs[1:])
    assert (runs[0][0] != runs[0][1]).any(), "heads draw their own"


def test_compact_moves_any_array_with_the_cache():
    seen = observed(20)
    slots = np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(20), (HEADS, 1)), axis=1)[:, :7])
    for array in (seen.positions, seen.keys):
        expected = np.stack([array[head][slots[head]] for head in range(HEADS)])
        np.testing.assert_array_equal(compact(array, slots), expected)


@pytest.mark.parametrize(
    ("text", "length", "tokens"),
    [
        ("tokens=512", 2048, 512),
        ("tokens=512", 100, 100),
        ("ratio=0.75", 2048, 512),
        ("ratio=0", 77, 77),
        ("ratio=0.9", 1000, 100),  # 1000 * (1 - 0.9) is 99.99... in binary
        ("mb=1", 5000, 43),
        ("mb=0.5", 10, 10),
    ],
)
def test_budgets(text, length, tokens):
    # A token of SmolLM2-135M: 30 layers, keys and values of 3 heads of 64 dimensions, in BF16.
    assert Budget.parse(text).tokens(length, 23040) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "512", "tokens=0", "tokens=1.5", "ratio=1", "ratio=-0.1", "ratio=nan", "mb=0", "mb=1/0", "kb=3"],
)
def test_texts_that_are_no_budget(text):
    with pytest.raises(InputError, match=re.escape(repr(text))):
        Budget.parse(text)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_layers_share_what_there_is(data):
    chosen = method(data.draw(st.sampled_from(["snapkv", "pyramidkv"])))
    layers, length = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    least = min(36, length)
    total = data.draw(st.integers(least * layers, length * layers))
    budgets = layer_budgets(chosen, layers, total, length=length)
    assert sum(budgets) == total and len(budgets) == layers
    assert all(least <= budget <= length for budget in budgets)
    if chosen.name == "pyramidkv":
        assert all(late <= early + 1 for early, late in pairwise(budgets))
    else:
        assert max(budgets) - min(budgets) <= 1


def test_the_published_pyramid():
    # KVCache-Factory's formula: from 2 c - c / 20 down to c / 20 for a mean of c = 200 chosen tokens, here of 5 layers.
    budgets = layer_budgets(method("pyramidkv"), 5, 5 * 236, length=1000)
    assert budgets == [36 + share for share in (390, 295, 200, 105, 10)]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: method("lru"), "no selection method is named 'lru'; have expected-attention, h2o"),
        (lambda: method("h2o", window=3), "h2o has no option 'window'; it has none"),
        (lambda: method("snapkv", kernel=4), "over 4 tokens"),
        (lambda: method("snapkv", pooling="sum"), "'sum'"),
        (lambda: method("pyramidkv", beta=0.5), "beta is 0.5"),
        (lambda: method("r-kv", mix=2), "mix 2"),
        (lambda: method("expected-attention", future=0), "0 positions"),
        (lambda: method("kvcrush", share=1.5), "share is 1.5"),
        (lambda: method("kvcrush", anchor="median"), "no anchor 'median'; have random, mean"),
        (lambda: method("kvcrush", page=0), "page is 0"),
        (lambda: method("kvcrush", scorer="lru"), "no selection method is named 'lru'"),
        (lambda: keep(Uniform(), observed(100), 35), "a budget of 35 tokens is less than the 4 first and 32 last"),
        (lambda: layer_budgets(Uniform(), 3, 100, length=90), "give 108 to 270"),
        (lambda: observed(9, keys=np.zeros((3, 8, 16), np.float32)), r"keys are of \(3, 8\)"),
        (lambda: observed(4, window=5), "do not fit 3 KV heads with 4 tokens"),
        (lambda: observed(9, rope=np.ones(4, np.float32)), "only RoPE of whole keys"),
    ],
)  # fmt: skip
def test_refusals(attempt, message):
    with pytest.raises(InputError, match=message):
        attempt()


def test_methods_are_values():
    assert method("kvcrush", scorer="h2o") == method("kvcrush", scorer=method("h2o"))
    assert str(method("snapkv")) == "SnapKV(kernel=5, pooling='mean')"
    assert all(kind.__doc__ for kind in Method.registry.values())

"""KVCrush against the definition written out token by token, and where published code went wrong."""

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import HEADS, observed

from specqd.selection import KVCrush, Method, Observed, keep, method
from specqd.selection.kvcrush import Anchor, hamming, head_codes


def seen(scores):
    """A cache whose scores by H2O are these."""
    scores = np.asarray(scores, np.float32)
    return Observed(np.tile(np.arange(scores.shape[1], dtype=np.int32), (len(scores), 1)), measured=scores)


def by_hand(scores, count, share, anchor, page):
    """Section 2 of the paper in plain Python: lists and loops, no packed bits."""
    heads, length = len(scores), len(scores[0])
    ranked = [sorted(range(length), key=lambda t, h=h: (-scores[h][t], t)) for h in range(heads)]
    marked = [set(order[: length // 2]) for order in ranked]
    pages = [range(at, at + page) for at in range(0, length - page + 1, page)]
    codes = [[t in marked[h] for h in range(heads) for t in p] for p in pages]
    distances = [sum(bit != wanted for bit, wanted in zip(code, anchor, strict=True)) for code in codes]
    proxies = int(share * count) // page
    kept = []
    for h in range(heads):
        sums = [np.sum([scores[h][t] for t in p], dtype=np.float32) for p in pages]
        best = sorted(range(len(pages)), key=lambda p: (-sums[p], p))[: count // page - proxies]
        rest = sorted(set(range(len(pages))) - set(best), key=lambda p: (distances[p], p))
        spaced = [rest[i * len(rest) // proxies] for i in range(proxies)]
        tokens = [t for p in best + spaced for t in pages[p]]
        singles = [t for t in ranked[h] if t not in tokens]
        kept.append(sorted(tokens + singles[: count - len(tokens)]))
    return kept


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_as_the_paper_describes_it(data):
    heads, length = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 60))
    page = data.draw(st.sampled_from([1, 2, 16]))
    count = data.draw(st.integers(0, length))
    share = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    # Few different values: ties must be broken alike.
    scores = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=length, max_size=length),
                                min_size=heads, max_size=heads))  # fmt: skip
    mode = data.draw(st.sampled_from(["zeros", "ones", "alternating"]))
    anchor = {"zeros": [0], "ones": [1], "alternating": [0, 1]}[mode] * heads * page
    crush = KVCrush(scorer=method("h2o"), share=share, anchor=mode, page=page)
    # Budget = candidates alone: no sinks, nothing recent.
    slots = keep(crush, seen(scores), count, sinks=0, recent=0)
    assert slots.tolist() == by_hand(scores, count, share, anchor[: heads * page], page)


def test_every_order_of_four_tokens_and_two_heads():
    orders = [list(map(float, order)) for order in itertools.permutations(range(4))]
    for first, second in itertools.product(orders, orders):
        codes = head_codes(np.array([first, second], np.float32))
        assert codes.tolist() == [[first[t] >= 2, second[t] >= 2] for t in range(4)]


def test_a_page_code_is_ordered_by_head_then_token():
    codes = head_codes(np.array([[3, 0, 0, 2], [0, 3, 2, 0]], np.float32), page=2)
    assert codes.tolist() == [[True, False, False, True], [False, True, True, False]]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 48])
def test_hamming_distance_in_packed_bits(width):
    rng = np.random.default_rng(0)
    codes, anchor = rng.integers(0, 2, (50, width)).astype(bool), rng.integers(0, 2, width).astype(bool)
    np.testing.assert_array_equal(hamming(codes, anchor), (codes != anchor).sum(axis=1))


def test_hamming_distance_of_every_byte():
    bytes_ = (np.arange(256)[:, None] >> np.arange(8)) % 2 == 1
    for anchor in bytes_:
        np.testing.assert_array_equal(hamming(bytes_, anchor), (bytes_ ^ anchor).sum(axis=1))


def test_no_head_takes_a_token_twice_whatever_the_first_head_kept():
    # The second head's best tokens are the first head's worst: a filter that looks at head 0 would take them again.
    scores = np.array([np.arange(32), -np.arange(32)], np.float32)
    slots = keep(
        KVCrush(scorer=method("h2o"), share=0.5, anchor="zeros"), seen(scores), 16, sinks=0, recent=0
    )
    assert all(len(set(head)) == 16 for head in slots.tolist())
    assert set(range(24, 32)) <= set(slots[0].tolist()) and set(range(8)) <= set(slots[1].tolist())


def test_without_a_share_it_is_its_scorer():
    case = observed(90)
    for name in sorted(set(Method.registry) - {"kvcrush"}):
        alone = keep(method(name), case, 50)
        np.testing.assert_array_equal(keep(method("kvcrush", scorer=name, share=0), case, 50), alone)


@pytest.mark.parametrize("anchor", get_args(Anchor))
def test_proxies_are_added_to_the_most_important_tokens(anchor):
    case = observed(90)
    slots = keep(method("kvcrush", share=0.5, anchor=anchor, scorer="h2o"), case, 56)
    important = keep(method("h2o"), case, 36 + 10)
    assert all(set(few) <= set(many) for few, many in zip(important.tolist(), slots.tolist(), strict=True))


def test_anchors():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(HEADS, 64)).astype(np.float32)
    codes = head_codes(scores, 16)

    def anchor(mode, layer=0, seed=0):
        return KVCrush(anchor=mode, page=16, seed=seed)._anchor(codes, layer)

    np.testing.assert_array_equal(anchor("mean"), codes.mean(axis=0) > 0.5)
    np.testing.assert_array_equal(anchor("inverse-mean"), ~anchor("mean"))
    assert anchor("mean").any(), "pages have majorities; single tokens never do"
    assert anchor("alternating")[:4].tolist() == [False, True, False, True]
    assert not anchor("zeros").any() and anchor("ones").all()
    np.testing.assert_array_equal(anchor("random"), anchor("random"))
    assert (anchor("random") != anchor("random", seed=1)).any()
    assert (anchor("random") != anchor("random", layer=1)).any()


def test_a_majority_of_heads_bits_never_is_one_in_token_form():
    for length in range(1, 20):
        codes = head_codes(np.random.default_rng(length).normal(size=(2, length)).astype(np.float32))
        assert not KVCrush(anchor="mean")._anchor(codes, 0).any()


def test_pages_stay_whole():
    case = observed(132)
    slots = keep(method("kvcrush", scorer="h2o", page=16), case, 16 + 64 + 20, sinks=16, recent=20)
    for head in slots[:, 16:-20].tolist():
        assert [slot % 16 for slot in head] == list(range(16)) * 4
    assert (slots[:, :16] == np.arange(16)).all()

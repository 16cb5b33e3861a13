"""Scores against the published definitions, written in torch, and against kvpress where it is installed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from selection_cases import DIM, GROUP, HEADS, observed, rope_angles
from torch.nn import functional

from specqd.selection import layer_budgets, method

LENGTH = 70
TOLERANCE = {"rtol": 2e-5, "atol": 2e-7}  # float32 sums in another order


def tensors(seen):
    return (torch.from_numpy(array) for array in (seen.keys, seen.values, seen.queries))


def attention(seen):
    """[kv_heads * group, window, T] as eager attention computes it, with a mask made of positions."""
    keys, _, queries = tensors(seen)
    window, length = queries.shape[2], keys.shape[1]
    keys = keys.repeat_interleave(GROUP, dim=0)
    logits = queries.reshape(-1, window, DIM) @ keys.mT * seen.scale
    future = torch.ones(window, length, dtype=torch.bool).triu(length - window + 1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def test_attention_of_the_last_queries():
    seen = observed(LENGTH)
    expected = attention(seen)
    np.testing.assert_allclose(seen.attention.reshape(expected.shape), expected, **TOLERANCE)
    assert (seen.attention[..., 0, -7:] == 0).all(), (
        "the first of 8 queries does not see the 7 tokens after it"
    )


def snapkv(seen):
    window = seen.window
    mass = attention(seen)[..., :-window].mean(-2)
    pooled = functional.avg_pool1d(mass, 5, padding=2, stride=1).view(HEADS, GROUP, -1).mean(1)
    return functional.pad(pooled, (0, window), value=pooled.max().item() + 1)


def key_diff(seen):
    keys, *_ = tensors(seen)
    anchor = functional.normalize(keys, dim=-1).mean(1, keepdim=True)
    return -functional.cosine_similarity(keys, anchor, dim=-1)


def r_kv(seen):
    keys, *_ = tensors(seen)
    mass = attention(seen).view(HEADS, GROUP, -1, LENGTH).mean((1, 2))
    importance = functional.max_pool1d(mass, 7, padding=3, stride=1)
    cosines = functional.cosine_similarity(keys[:, :, None], keys[:, None], dim=-1)
    for head in cosines:
        head.fill_diagonal_(0)
        for row in head:
            alike = (row > 0.5).nonzero()
            if len(alike):
                row[alike.max()] = 0
    return 0.1 * importance - 0.9 * cosines.mean(1).softmax(-1)


def rotate(vectors, positions, sign=1):
    """RoPE as in transformers' Llama; `sign` -1 turns back."""
    angles = sign * positions[:, None] * torch.from_numpy(rope_angles()).double().repeat(2)
    half = DIM // 2
    turned = torch.cat([-vectors[..., half:], vectors[..., :half]], -1)
    return vectors * angles.cos() + turned * angles.sin()


def expected_attention(seen):
    """By the mean of rotated statistics, without ever forming RoPE's matrix; in float64."""
    keys, values, queries = (tensor.double() for tensor in tensors(seen))
    last = torch.arange(LENGTH - seen.window, LENGTH).double()
    future = torch.arange(LENGTH, LENGTH + 512).double()
    scores = torch.empty(HEADS, GROUP, LENGTH - 4, dtype=torch.float64)
    for head in range(HEADS):
        for member in range(GROUP):
            plain = rotate(queries[head, member], last, -1)
            turned = torch.stack([rotate(row.expand(512, DIM), future).mean(0) for row in plain])
            mean = turned.mean(0)
            covariance = (turned - mean).T @ (turned - mean) / len(turned)
            k = keys[head, 4:]
            logits = k @ mean / DIM**0.5 + torch.einsum("ti,ij,tj->t", k, covariance, k) / (2 * DIM)
            scores[head, member] = logits.softmax(-1)
    found = scores.mean(1) * values[:, 4:].norm(dim=-1)
    return functional.pad(found, (4, 0), value=found.max().item() + 1)


ORACLES = {
    "streaming-llm": lambda seen: torch.arange(LENGTH).expand(HEADS, LENGTH).float(),
    "key-norm": lambda seen: -torch.from_numpy(seen.keys).norm(dim=-1),
    "key-diff": key_diff,
    "h2o": lambda seen: attention(seen).view(HEADS, GROUP, -1, LENGTH).mean((1, 2)),
    "snapkv": snapkv,
    "pyramidkv": snapkv,
    "tova": lambda seen: attention(seen)[:, -1].mean(0).expand(HEADS, LENGTH),
    "r-kv": r_kv,
    "expected-attention": expected_attention,
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_as_published(name, seed):
    seen = observed(LENGTH, seed)
    np.testing.assert_allclose(method(name).score(seen), ORACLES[name](seen), **TOLERANCE)


def test_max_pooling():
    seen = observed(LENGTH)
    mass = seen.received[:, : -seen.window]
    expected = [[row[max(0, at - 3) : at + 4].max() for at in range(len(row))] for row in mass]
    np.testing.assert_array_equal(
        method("snapkv", kernel=7, pooling="max").score(seen)[:, : -seen.window], expected
    )


def test_redundancy_does_not_depend_on_how_the_matrix_is_cut(monkeypatch):
    seen = observed(LENGTH)
    whole = method("r-kv").score(seen)
    monkeypatch.setattr("specqd.selection.r_kv._COLUMNS", (4, 16))
    np.testing.assert_allclose(method("r-kv").score(seen), whole, **TOLERANCE)


class _Rotary(torch.nn.Module):
    def forward(self, _, positions):
        angles = positions[..., None] * torch.from_numpy(rope_angles()).repeat(2)
        return angles.cos(), angles.sin()


def _kvpress_module(window):
    """An attention layer whose query projection hands out what it is given, so that kvpress sees our queries."""
    heads = HEADS * GROUP
    module = torch.nn.Module()
    module.config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=HEADS)
    module.head_dim, module.layer_idx = DIM, 0
    module.q_proj, module.rotary_emb = torch.nn.Identity(), _Rotary()
    return module


KVPRESS = {
    "key-norm": ("KnormPress", {}),
    "key-diff": ("KeyDiffPress", {}),
    "snapkv": ("SnapKVPress", {"window_size": 8}),
    "pyramidkv": ("PyramidKVPress", {"window_size": 8}),
    "tova": ("TOVAPress", {}),
    "h2o": ("ObservedAttentionPress", {}),
    "expected-attention": ("ExpectedAttentionPress", {}),
}


@pytest.mark.filterwarnings("default")  # kvpress and what it imports are not ours to keep quiet
@pytest.mark.parametrize("name", KVPRESS)
def test_scores_equal_those_of_kvpress(name):
    kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed; the oracles above always run")
    # Expected Attention takes its statistics of all queries but those of the sinks, observed attention of all.
    window = {"expected-attention": LENGTH - 4, "h2o": LENGTH}.get(name, 8)
    seen = observed(LENGTH, window=window)
    keys, values, queries = tensors(seen)
    last = torch.arange(LENGTH - window, LENGTH).double()
    plain = rotate(queries.double(), last, -1).float().reshape(HEADS * GROUP, window, DIM)
    hidden = torch.zeros(1, LENGTH, HEADS * GROUP * DIM)
    hidden[0, LENGTH - window :] = plain.transpose(0, 1).flatten(1)
    cos, sin = _Rotary()(None, torch.arange(LENGTH)[None])
    kind, options = KVPRESS[name]
    weights = attention(seen)[None] if name == "h2o" else None
    press = getattr(kvpress, kind)(compression_ratio=0.5, **options)
    module = _kvpress_module(window)
    theirs = press.score(
        module, hidden, keys[None], values[None], weights, {"position_embeddings": (cos, sin)}
    )
    ours = method(name).score(seen)
    if name == "h2o":  # kvpress divides by how many queries could see a key
        ours = ours * LENGTH / np.arange(LENGTH, 0, -1)
    if name == "tova":  # kvpress lets the newest token always win
        ours, theirs = ours[:, :-1], theirs[..., :-1]
    np.testing.assert_allclose(ours, theirs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("length", "ratio"), [(4000, 0.75), (4000, 0.875), (1000, 0.5)])
def test_a_pyramid_has_the_budgets_of_kvpress(length, ratio):
    kvpress = pytest.importorskip(
        "kvpress", reason="kvpress is not installed; the budgets' sum is tested anyway"
    )
    press, module = kvpress.PyramidKVPress(compression_ratio=ratio, window_size=8), _kvpress_module(8)
    module.config.num_hidden_layers = layers = 12
    theirs = []
    for module.layer_idx in range(layers):
        theirs.append(press.get_layer_budget(module, length))
    total = round(length * (1 - ratio)) * layers
    ours = layer_budgets(method("pyramidkv"), layers, total, length=length - 8, sinks=0, recent=0)
    # kvpress rounds each budget, and specqd their running sum, which is that of the budget asked for.
    assert np.abs(np.subtract(ours, theirs)).max() <= 1 and sum(ours) == total


def test_a_cache_that_was_selected_from_is_scored_by_its_own_tokens():
    seen = observed(LENGTH)
    early = replace(seen, positions=seen.positions * 3)
    np.testing.assert_array_equal(method("h2o").score(early), method("h2o").score(seen))
    assert (method("expected-attention").score(early) != method("expected-attention").score(seen)).any()

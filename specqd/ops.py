"""The `specqd::` operators that graphs may hold, each with its reference meaning in eager torch."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed::*, which graphs in INT8 hold
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from specqd.cache_formats import FORMATS, as_read, held, rotated, rotated_back
from specqd.manifest import BLOCK

__all__ = [
    "REFINED_TOGETHER", "among_all", "attention", "cached_attention", "causal_attention", "linear_int8", "linear_mxfp4",
    "linear_refined", "rms_norm", "rope",
]  # fmt: skip

REFINED_TOGETHER = 16
"""Neighbouring channels that `linear_refined` computes again as one: a block of the matrix kernels."""


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    q_pos: Tensor,
    rounded: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend float32 `q [B, H, S, D]` to `k, v [B, KV, T, D]` where key slot t may be seen by positions >= t.

    `rounded`: other keys and values, and bool `[S, T]` that says which rows see which slots in that form.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    if rounded:
        keys, others, where = (x.repeat_interleave(groups, dim=1) if x.dim() == 4 else x for x in rounded)
        scores = torch.where(where, (q @ keys.transpose(-1, -2)) * scale, scores)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    slots = torch.arange(k.shape[2], device=q.device)
    seen = slots[None, :] <= q_pos[:, None]
    if window:
        seen = seen & (slots[None, :] > q_pos[:, None] - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    if rounded:
        return (weights.masked_fill(where, 0.0) @ v + weights.masked_fill(~where, 0.0) @ others).transpose(
            1, 2
        )
    return (weights @ v).transpose(1, 2)


@torch.library.custom_op("specqd::causal_attention", mutates_args=())
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    layer: int,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Stateless causal attention of one layer.

    `q [B, H, S, D]`, `k [B, KV, S, D]`, `v [B, KV, S, Dv]` -> `[B, S, H, Dv]`. A query sees itself and the
    `window - 1` positions before it (`window` 0: all of them). Scores are `softcap * tanh(s / softcap)` when
    `softcap` is not 0; `sinks [H]` adds one score a head that takes weight and gives nothing.
    """
    return _attend(
        q, k, v, scale, window, softcap, sinks, torch.arange(q.shape[2], device=q.device)
    ).contiguous()


@causal_attention.register_fake
def _(q, k, v, scale, layer, window, softcap, sinks):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _attend_in_parts(
    q: Tensor,
    keys: tuple[Tensor, str, bool],
    values: tuple[Tensor, str, bool],
    end: int,
    recent: int,
    given: tuple[float, int, float, Tensor | None, Tensor],
) -> Tensor:
    """Attend to slots up to `end` of which those of older blocks are rounded; a part is a cache, its format, which."""
    k, v = (cache[:, :end].unsqueeze(0).to(q.dtype) for cache, *_ in (keys, values))
    of_keys, of_values = (
        as_read(x, dtype, keys=which) if dtype else x
        for x, (_, dtype, which) in zip((k, v), (keys, values), strict=True)
    )
    blocks = torch.arange(end, device=q.device) // BLOCK
    older = (given[-1] // BLOCK)[:, None] - blocks[None, :] > recent // BLOCK
    return _attend(q, k, v, *given, (of_keys, of_values, older)).contiguous()


@torch.library.custom_op("specqd::cached_attention", mutates_args=("cache_k", "cache_v", "received"))
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor,
    scale: float,
    layer: int,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    key_dtype: str = "",
    value_dtype: str = "",
    received: Tensor | None = None,
    recent: int | None = None,
    rotate: bool = False,
) -> Tensor:
    """Write `k, v` into slot `positions` of layer `layer` of the cache, then attend to slots up to each position.

    Shapes as `causal_attention` with B = 1, `positions int64 [1, S]` consecutive, caches as in
    `specqd.program.KVCache`. Keys and values are rounded to the cache's dtype before they are used; `key_dtype` and
    `value_dtype` name a format of specqd.cache_formats that they are rounded to before, or, with `recent`, when
    they are read by a position whose block begins more than so many positions after theirs. With `rotate`, values are
    rotated before that, and the result back. `received float32 [layers, KV, capacity]` gets the
    weight that each slot up to the last position was given, the mean over the rows and the queries of a key head.
    """
    where = positions[0]
    if recent is not None:
        turned, turned_values = (dtype != "" and FORMATS[dtype].turned for dtype in (key_dtype, value_dtype))
        turned_values |= rotate
        q, k = (rotated(x) if turned else x for x in (q, k))
        for new, cache in ((k, cache_k), (rotated(v) if turned_values else v, cache_v)):
            cache[layer, :, where] = new[0].to(cache.dtype)
        given = (scale, window, softcap, sinks, where)
        parts = ((cache_k[layer], key_dtype, True), (cache_v[layer], value_dtype, False))
        mixed = _attend_in_parts(q, *parts, int(where[-1]) + 1, recent, given)
        return rotated_back(mixed) if turned_values else mixed
    for new, cache, dtype in ((k, cache_k, key_dtype), (v, cache_v, value_dtype)):
        cache[layer, :, where] = (held(new[0], dtype) if dtype else new[0]).to(cache.dtype)
    end = int(where[-1]) + 1
    keys, values = (c[layer, :, :end].unsqueeze(0).to(q.dtype) for c in (cache_k, cache_v))
    if received is not None:
        # Values that say where they are make the weights themselves the result of attending.
        places = torch.eye(end, dtype=q.dtype).expand(1, k.shape[1], end, end)
        weights = _attend(q, keys, places, scale, window, softcap, sinks, where)[0]
        received[layer, :, :end] = weights.unflatten(1, (k.shape[1], -1)).mean((0, 2))
    return _attend(q, keys, values, scale, window, softcap, sinks, where).contiguous()


@cached_attention.register_fake
def _(q, k, v, *_, **__):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("specqd::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """`softmax(q k^T scale + mask) v` of float32 `q [B, H, L, D]`, `k [B, H, S, D]`, `v [B, H, S, Dv]`.

    A float32 `mask`, which spreads to `[B, H, L, S]`, is added; of a bool one, what is false is not seen. `causal`:
    query i sees the keys up to the i-th. A row that sees nothing gives zeros.
    """
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale).contiguous()


@attention.register_fake
def _(q, k, v, mask, scale, causal):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("specqd::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension; no weight means times one."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y.clone() if weight is None else y * (offset + weight.to(x.dtype))


@rms_norm.register_fake
def _(x, weight, eps, offset):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("specqd::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the first R of D channels: `x [B, H, S, D]`, `cos, sin [B, S, R]`; the rest passes.

    `y = x * cos + rotate_half(x) * sin`, `rotate_half([a, b]) = [-b, a]` (RoFormer, in transformers' layout).
    """
    r = cos.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    half = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), dim=-1)
    return torch.cat((turned * cos.unsqueeze(1) + half * sin.unsqueeze(1), rest), dim=-1)


@rope.register_fake
def _(x, cos, sin):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("specqd::linear_mxfp4", mutates_args=())
def linear_mxfp4(x: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., K]` times an MXFP4 matrix: `blocks uint8 [N, K/2]`, `scales uint8 [N, K/32]` (OCP MX v1.0).

    Codegen may round `x` to INT8 in blocks of 32 first; the reference does not.
    """
    from specqd.passes.quantize.mxfp4 import decode

    return F.linear(x, decode(blocks, scales).to(x.dtype), None if bias is None else bias.to(x.dtype))


@linear_mxfp4.register_fake
def _(x, blocks, scales, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], blocks.shape[0])


@torch.library.custom_op("specqd::linear_int8", mutates_args=())
def linear_int8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., K]` times `values int8 [N, K]` scaled by `scales float32 [N]` a row; see `linear_mxfp4` on `x`."""
    weight = values.to(x.dtype) * scales.to(x.dtype)[:, None]
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@linear_int8.register_fake
def _(x, values, scales, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("specqd::linear_refined", mutates_args=())
def linear_refined(
    x: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, weight: Tensor, best: int
) -> Tensor:
    """`linear_mxfp4`, of whose result the largest channels of each row are computed again from `weight [N, K]`.

    Channels are taken in groups of 16 neighbours, the last one maybe shorter. The `best` groups with the largest
    maxima, of equal ones the first, get the values of `x @ weight.T + bias`.
    """
    result: Tensor = linear_mxfp4(x, blocks, scales, bias)
    exact = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    n = result.shape[-1]
    padded = F.pad(result, (0, -n % REFINED_TOGETHER), value=float("-inf"))
    maxima = padded.unflatten(-1, (-1, REFINED_TOGETHER)).amax(-1)
    order = maxima.sort(dim=-1, descending=True, stable=True).indices[..., :best]
    chosen = torch.zeros_like(maxima, dtype=torch.bool).scatter_(-1, order, True)
    return torch.where(chosen.repeat_interleave(REFINED_TOGETHER, -1)[..., :n], exact, result)


@linear_refined.register_fake
def _(x, blocks, scales, bias, weight, best):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], blocks.shape[0])


@torch.library.custom_op("specqd::among_all", mutates_args=())
def among_all(x: Tensor, places: Tensor) -> Tensor:
    """Logits `x [..., n]` of some tokens among those of all: `[..., V]`, from `places int32 [V]`.

    Token t has the logit at `places[t]`, or -inf where that is -1.
    """
    known = x[..., places.clamp(min=0).long()]
    return known.masked_fill(places < 0, float("-inf"))


@among_all.register_fake
def _(x, places):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], places.shape[0])

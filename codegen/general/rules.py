"""Decompositions that torch lacks, or has in a form that takes longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._decomp.decompositions import one_layer_lstm
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CodegenError

__all__ = ["OWN"]

aten = torch.ops.aten

#: channels of a head beyond which what a task mixes would not stay in the first cache
MOST_CHANNELS = 256


def _attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The operator behind torch.nn.MultiheadAttention's fast path."""
    parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2)
        for x, w, b in parts
    )
    scores = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        # 0: of each pair of positions; 1: of keys, by batch; 2: of all
        shaped = mask[:, None, None, :] if mask_type == 1 else mask
        scores = scores.masked_fill(shaped, float("-inf")) if mask.dtype is torch.bool else scores + shaped
    weights = scores.softmax(-1)
    found = F.linear((weights @ v).transpose(1, 2).flatten(-2), proj_weight, proj_bias)
    if not need_weights:
        return found, None
    return found, weights.mean(1) if average_attn_weights else weights


def _encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """The operator behind torch.nn.TransformerEncoderLayer's fast path."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        return _attention(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type
        )[0]  # fmt: skip

    def feed(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed(x), norm_weight_2, norm_bias_2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scaled dot-product attention on a CPU; torch's own rule also looks for rows that a mask hides whole."""
    by = query.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is not None:
        rule = decomposition_table[aten._scaled_dot_product_flash_attention_for_cpu.default]
        found, sums = rule(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    else:
        scores = (query * by) @ key.transpose(-2, -1)
        if is_causal:
            rows, columns = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
            scores = torch.where(rows[:, None] >= columns, scores, float("-inf"))
        found, sums = scores.softmax(-1) @ value, scores.logsumexp(-1)
    if _has_kernel(query, key, value, attn_mask):
        found = torch.ops.specqd.attention(query, key, value, attn_mask, by, is_causal)
    return found, sums


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether one kernel computes attention: in float32, over channels whose number is known and fits in its memory."""
    given = [query, key, value, *([] if mask is None or mask.dtype is torch.bool else [mask])]
    channels = (query.shape[-1], value.shape[-1])
    return all(x.dtype is torch.float32 for x in given) and all(
        isinstance(n, int) and 0 < n <= MOST_CHANNELS for n in channels
    )


def _adaptive_avg_pool3d(x: Tensor, size: list[int]) -> Tensor:
    """Average over the last two dimensions, then over the one before: the windows are boxes."""
    depth, height, width = size
    flat = F.adaptive_avg_pool2d(x.reshape(-1, *x.shape[-2:]), (height, width))
    deep = F.adaptive_avg_pool2d(flat.reshape(-1, x.shape[-3], height * width), (depth, height * width))
    return deep.reshape(*x.shape[:-3], depth, height, width)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Put the elements of `source`, in their order, where the mask is true."""
    mask = mask.expand_as(x)
    places = (mask.reshape(-1).cumsum(0) - 1).clamp_min(0).reshape(x.shape)
    return torch.where(mask, source.reshape(-1)[places.where(mask, 0)], x)


def _lstm(
    x: Tensor, ih_weight: Tensor, hh_weight: Tensor, ih_bias: Tensor, hh_bias: Tensor, hidden: Tensor, cell: Tensor,
    reverse: bool, batch_sizes: list[int], mode: int, hidden_size: int, num_layers: int, has_biases: bool,
    bidirectional: bool, batch_first: bool, train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator that torch makes of each layer and direction of an LSTM on a CPU, time first, step by step."""
    if batch_sizes:
        raise CodegenError("packed sequences are not compiled: pad them, and give the LSTM a tensor")
    weights = [ih_weight, hh_weight, *([ih_bias, hh_bias] if has_biases else [])]
    rows = hidden.shape[-2:]  # torch calls it with and without a dimension of one layer in front
    found, (last, kept) = one_layer_lstm(
        x, (hidden.reshape(rows), cell.reshape(rows)), weights, has_biases, reverse
    )
    return found, last.reshape(hidden.shape), kept.reshape(cell.shape), x.new_empty(0)


OWN: dict[Any, Callable[..., Any]] = {
    aten._native_multi_head_attention.default: _attention,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    aten._adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    aten.mkldnn_rnn_layer.default: _lstm,
    aten.masked_scatter.default: _masked_scatter,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attend,
}
"""Operator -> function of the same arguments in other operators of torch."""

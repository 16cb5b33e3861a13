"""Decompositions that torch lacks, or has in a form that takes longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.modules.linear_cross_entropy  # which registers its operators
from torch import Tensor
from torch._decomp import decomposition_table
from torch._refs import istft
from torch.nn import functional as F  # noqa: N812

from specqd.codegen.general.fourier import WINDOWS, centred_stft, stft
from specqd.codegen.general.recurrent_rules import LAYERS, lstm_layer
from specqd.codegen.general.sampling_rules import SAMPLING

__all__ = ["COMPOSITES", "OWN"]

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


def _adaptive_max_pool(x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The largest element of each window, and its place; windows of one size are repeats of their last element."""
    rank = len(size)
    sizes = x.shape[-rank:]
    if all(isinstance(n, int) and n > 0 and o > 0 and n % o == 0 for n, o in zip(sizes, size, strict=True)):
        pool = aten.max_pool2d_with_indices if rank == 2 else aten.max_pool3d_with_indices
        window = [n // o for n, o in zip(sizes, size, strict=True)]
        values, places = pool(x, window, window)
        return values, places
    at: list[Tensor] = []
    flat = torch.zeros((), dtype=torch.long, device=x.device)
    for d, (n, o) in enumerate(zip(sizes, size, strict=True)):
        outer = torch.arange(o, device=x.device)
        begin, end = outer * n // o, ((outer + 1) * n + o - 1) // o
        inner = torch.arange(n // o + 2, device=x.device)
        index = torch.minimum(begin[:, None] + inner, end[:, None] - 1)
        shape = [1] * (2 * rank)
        shape[d], shape[rank + d] = index.shape
        at.append(index.reshape(shape))
        flat = flat * n + at[-1]
    values, first = aten.index.Tensor(x, [*[None] * (x.dim() - rank), *at]).flatten(-rank).max(-1)
    places = flat.flatten(-rank).expand(*first.shape, -1).gather(-1, first[..., None])
    return values, places.squeeze(-1)


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Go on with the other end of a dimension, for which torch would write into slices; other modes are left to it.

    Amounts begin with those of the last dimension.
    """
    if mode != "circular":
        return NotImplemented
    for k in range(len(pad) // 2):
        before, after = pad[2 * k : 2 * k + 2]
        cut = max(-before, 0)  # what is cut off does not come back at the other end
        n = x.shape[-1 - k] - cut - max(-after, 0)
        index = torch.arange(-max(before, 0), n + max(after, 0), device=x.device) % n + cut
        x = x.index_select(-1 - k, index)
    return x


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, expand_a: Sequence[int], expand_b: Sequence[int], expand_c: Sequence[int],
    summed: Sequence[int], _: int = 1,
) -> Tensor:  # fmt: skip
    """The product of three tensors, each with new dimensions, summed over some."""
    for d in expand_a:
        a = a.unsqueeze(d)
    for d in expand_b:
        b = b.unsqueeze(d)
    for d in expand_c:
        c = c.unsqueeze(d)
    return (a * b * c).sum(list(summed)) if summed else a * b * c


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """The distances of all pairs of rows, the first row's first."""
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, -1)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Put the elements of `source`, in their order, where the mask is true; either is spread."""
    x, mask = torch.broadcast_tensors(x, mask)
    places = (mask.reshape(-1).cumsum(0) - 1).clamp_min(0).reshape(x.shape)
    return torch.where(mask, source.reshape(-1)[places.where(mask, 0)], x)


def _embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
    """Sum (mode 0), average (1) or take the largest (2) of the rows of each bag; the offsets say where bags begin.

    What only a gradient of the maximum needs, the last result, is left out.
    """
    begins = (offsets[:-1] if include_last_offset else offsets).long()
    bags, length = begins.shape[0], indices.shape[0]
    # How many bags have begun by a position; one more position for empty bags at the end.
    steps = begins.new_zeros(length + 1).scatter_add(0, begins, torch.ones_like(begins))
    bag = steps.cumsum(0)[:length] - 1
    counted = (indices != padding_idx).to(torch.long)
    counts = torch.zeros_like(begins).scatter_add(0, bag, counted)
    rows, result = F.embedding(indices, weight), weight.new_zeros(bags, weight.shape[1])
    if mode == 2:
        rows = rows.where(counted[:, None] > 0, float("-inf"))
        largest = result.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)
        return largest.where(counts[:, None] > 0, 0.0), bag, counts, None
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    sums = result.index_add(0, bag, rows.where(counted[:, None] > 0, 0.0))
    return (sums / counts.clamp_min(1)[:, None] if mode == 1 else sums), bag, counts, None


def _nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: int = -100
) -> Tensor:
    """The likelihood of classes, reduced by the operator's numbers, which torch's own rule takes for others."""
    found: Tensor = aten.nll_loss_forward.default(x, target, weight, reduction, ignore_index)[0]
    return found


def _linear_cross_entropy(
    x: Tensor, linear: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, reduction: str,
    ignore_index: int, label_smoothing: float, *_: Any,
) -> tuple[Tensor, None, None, None]:  # fmt: skip
    """A loss whose operator goes through rows in chunks and computes gradients on the way, which are left out."""
    loss = F.cross_entropy(
        F.linear(x, linear, bias), target, weight, reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss, None, None, None


def _linear_cross_entropy_by_row(
    x: Tensor, linear: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, ignore_index: int, *_: Any
) -> Tensor:  # fmt: skip
    return _linear_cross_entropy(x, linear, target, bias, weight, "none", ignore_index, 0.0)[0]


OWN: dict[Any, Callable[..., Any]] = {
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten._native_multi_head_attention.default: _attention,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    aten._adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    aten.mkldnn_rnn_layer.default: lstm_layer,
    aten.masked_scatter.default: _masked_scatter,
    aten.nll_loss.default: _nll_loss,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.adaptive_max_pool3d.default: _adaptive_max_pool,
    aten._trilinear.default: _trilinear,
    aten._pdist_forward.default: _pdist,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attend,
    **SAMPLING,
    **WINDOWS,
    torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default: _linear_cross_entropy,
    torch.ops.torch_nn._linear_cross_entropy_batch_chunked_no_reduction.default: _linear_cross_entropy_by_row,
}
"""Operator -> function of the same arguments in other operators of torch."""

COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.istft.default: istft,
    aten.pad.default: _pad,
    aten.stft.default: stft,
    aten.stft.center: centred_stft,
    **LAYERS,
}
"""Likewise for operators that torch itself takes apart into others; NotImplemented leaves it to that."""

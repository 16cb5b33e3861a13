"""Attention where it is what torch knows; ONNX's own definition serves all other forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__: list[str] = []

_USUAL = {"softcap": 0.0, "left_window_size": -1, "right_window_size": -1}


@rule("Attention")
def _attention(
    node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *others: Tensor | None,
    is_causal: int = 0, q_num_heads: int | None = None, kv_num_heads: int | None = None,
    scale: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Scaled dot-product attention of `q [B, H, S, D]` or `[B, S, H D]`, without a cache."""
    extra = any(other is not None for other in others) or any(node.outputs[1:])
    unusual = any(options.get(key, usual) != usual for key, usual in _USUAL.items())
    if extra or unusual or q.dtype != torch.float32 or (is_causal and mask is not None):
        return NotImplemented
    flat = q.dim() == 3
    if flat:
        q, k, v = (
            x.unflatten(2, (heads or 1, -1)).transpose(1, 2)
            for x, heads in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads))
        )
    if mask is not None and mask.shape[-1] != k.shape[2]:
        return NotImplemented
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=bool(is_causal), scale=scale)
    return found.transpose(1, 2).flatten(2) if flat else found

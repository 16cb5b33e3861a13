"""A transformers model whose cache can be looked into, cut and rounded between two passes, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specqd.selection import Observed

__all__ = ["CacheModel", "Layer", "Read"]

_NAME = "specqd_kv_quality"


@dataclass(frozen=True)
class Layer:
    """One layer's cache: keys after RoPE and values, float32 [kv_heads, T, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Read:
    """What a pass over a whole text left behind; `queries` are [kv_heads, group, T, D] a layer, after RoPE."""

    layers: Sequence[Layer]
    queries: Sequence[Tensor]
    logits: Tensor
    scale: float
    rope: Tensor | None

    def observed(self, length: int, window: int) -> list[Observed]:
        """Show the cache as it was after `length` tokens, with the queries of the `window` last of them.

        Attention is causal, so one pass over a text shows all its beginnings.
        """
        heads = len(self.layers[0].keys)
        positions = np.tile(np.arange(length, dtype=np.int32), (heads, 1))
        return [
            Observed(
                positions,
                keys=layer.keys[:, :length].numpy(),
                values=layer.values[:, :length].numpy(),
                queries=queries[:, :, length - window : length].numpy(),
                scale=self.scale,
                rope=None if self.rope is None else self.rope.numpy(),
                layer=number,
                layers=len(self.layers),
            )
            for number, (layer, queries) in enumerate(zip(self.layers, self.queries, strict=True))
        ]


class CacheModel:
    """A decoder in float32 arithmetic. Its attention asks this object for the past, layer by layer."""

    def __init__(self, folder: Path | None = None, model: Any = None) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.AttentionInterface.register(_NAME, self._attend)
        transformers.AttentionMaskInterface.register(_NAME, lambda **_: None)
        if model is None:
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(folder, dtype=torch.float32, attn_implementation=_NAME)
        else:
            model.set_attn_implementation(_NAME)
        self.model = model.eval()
        self._past: Sequence[Layer] | None = None
        self._seen: list[tuple[Layer, Tensor]] = []
        self._scale = 1.0

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], logits_of: Sequence[int]) -> Read:
        """Pass over a text; the logits, float32 [rows, vocabulary], are those of the places in `logits_of`."""
        logits = self._forward(tokens, range(len(tokens)), None, torch.tensor(logits_of))[0]
        layers, queries = zip(*self._seen, strict=True)
        rotary = getattr(self.model.model, "rotary_emb", None)
        rope = None if rotary is None else rotary.inv_freq.detach().clone()
        return Read(layers, queries, logits, self._scale, rope)

    @torch.inference_mode()
    def extend(self, pasts: Sequence[Sequence[Layer]], tokens: Sequence[int], begin: int) -> Tensor:
        """Return the logits, float32 [pasts, tokens, vocabulary], of tokens that stand at `begin` and on in the text.

        They come behind each of several caches, whose layers have the same, any, lengths.
        """
        layers = [
            Layer(
                *(torch.stack(parts) for parts in zip(*((of.keys, of.values) for of in alike), strict=True))
            )
            for alike in zip(*pasts, strict=True)
        ]
        return self._forward(tokens, range(begin, begin + len(tokens)), layers, 0)

    def _forward(
        self, tokens: Sequence[int], positions: Sequence[int], past: Sequence[Layer] | None, keep: Any
    ) -> Tensor:
        self._past, self._seen = past, []
        count = 1 if past is None else len(past[0].keys)
        return self.model(
            input_ids=torch.tensor([list(tokens)]).expand(count, -1),
            position_ids=torch.tensor([list(positions)]).expand(count, -1),
            use_cache=False,
            logits_to_keep=keep,
        ).logits

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        mask_: Tensor | None = None
        if self._past is None:
            own = Layer(key[0], value[0])
            self._seen.append((own, query[0].view(len(own.keys), -1, *query.shape[2:])))
            self._scale = scaling
        else:
            past = self._past[module.layer_idx]
            key = torch.cat([past.keys, key], dim=2)
            value = torch.cat([past.values, value], dim=2)
            rows, total = query.shape[2], key.shape[2]
            mask_ = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
        group = query.shape[1] // key.shape[1]
        out = scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, dim=1),
            value.repeat_interleave(group, dim=1),
            attn_mask=mask_,
            is_causal=mask_ is None,
            scale=scaling,
        )
        return out.transpose(1, 2), None

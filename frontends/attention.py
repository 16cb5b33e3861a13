"""The attention function `specqd` of transformers: a layer's attention becomes one `causal_attention` node.

The mask interface is registered too. It makes no tensor: it hands each layer a `CausalMask` saying which
window the model asked for, checked by probing the model's own mask function. So the graph holds no mask
arithmetic, and a mask that is not causal cannot pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import specqd.ops  # noqa: F401  (registers specqd::causal_attention)
from specqd.errors import CaptureError

__all__ = ["ATTENTION", "CausalMask", "register"]

ATTENTION = "specqd"

_IGNORED = frozenset(
    {
        # What eager attention of every family ignores, or what only says what forward should return.
        "cache_position", "cache_params", "output_attentions", "output_hidden_states", "position_embeddings",
        "position_ids", "return_dict", "use_cache",
        # The window is taken from the mask, which is what eager attention obeys.
        "sliding_window",
    }
)  # fmt: skip


@dataclass(frozen=True)
class CausalMask:
    """A causal mask without a tensor: a query sees itself and the `window - 1` positions before (0: all).

    `fault`: why no layer can be given it.
    """

    window: int
    fault: str | None = None


def register() -> None:
    """Make transformers know the attention and mask function `specqd`; does nothing the second time."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _mask(*, mask_function: Callable[..., Tensor], local_size: int | None = None, **_: Any) -> CausalMask:
    # Export runs under thread-local tracing modes that would record the probe; a thread of its own has none.
    with ThreadPoolExecutor(1) as thread:
        fault = thread.submit(_differs, mask_function, local_size or 0).result()
    # A window of 0 sees nothing: what Qwen2-MoE makes for layers that it has not, if it is to have no windows.
    if fault and local_size != 0:
        raise CaptureError(_refusal("the model", fault))
    return CausalMask(local_size or 0, fault)


def _refusal(who: str, fault: str) -> str:
    return (
        f"{who} asks for an attention mask that is not causal with a fixed window ({fault}); specqd compiles causal "
        "decoders only"
    )


def _differs(mask_function: Callable[..., Tensor], window: int) -> str | None:
    """Say where the model's mask differs from a causal one with this window, at some queries and all keys."""
    edges = (max(window + d, 0) for d in (-1, 0, 1))
    queries = torch.tensor(sorted({0, 1, 2, 5, 63, *edges, 2 * window + 1}))
    q, k = queries[:, None], torch.arange(int(queries[-1]) + 3)[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    wanted = (k <= q) & ((k > q - window) if window else True)
    try:
        got = mask_function(zero, zero, q, k).expand(wanted.shape)
        wrong = (got != wanted).nonzero().tolist()
    except Exception:  # foreign code, and tensors of the trace: whatever is raised, the mask is not plain
        return "it depends on more than positions, as chunks, packed sequences and images do"
    if wrong:
        row, slot = wrong[0]
        return f"position {int(queries[row])} {'sees' if got[row, slot] else 'does not see'} position {slot}"
    return None


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    mask = _causal(module, attention_mask, given.pop("is_causal", None), where)
    if given.pop("dropout", 0.0):
        raise CaptureError(f"{where} drops attention weights out; call model.eval() before capture")
    if query.shape[2] is not key.shape[2] and not _same(query.shape[2], key.shape[2]):
        raise CaptureError(f"{where} attends to another sequence; specqd does not compile cross attention")
    scale, softcap, sinks = given.pop("scaling", None), given.pop("softcap", None), given.pop("s_aux", None)
    unknown = sorted(k for k, v in given.items() if k not in _IGNORED and v is not None and v is not False)
    if unknown:
        raise CaptureError(f"{where} passes {', '.join(unknown)} to its attention, unknown to specqd")
    out = torch.ops.specqd.causal_attention(
        query,
        key,
        value,
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        _layer(module, where),
        mask.window,
        float(softcap or 0.0),
        sinks,
    )
    return out, None


def _causal(module: torch.nn.Module, mask: Any, is_causal: bool | None, where: str) -> CausalMask:
    if isinstance(mask, CausalMask) and mask.fault:
        raise CaptureError(_refusal(where, mask.fault))
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise CaptureError(f"{where} is not causal; specqd compiles causal decoders only")
    if not isinstance(mask, CausalMask):
        raise CaptureError(
            f"{where} is given {'no mask' if mask is None else 'a mask of its own making (such as ALiBi)'} "
            "instead of one from transformers' mask interface, so specqd cannot tell what it may see"
        )
    return mask


def _layer(module: torch.nn.Module, where: str) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise CaptureError(f"{where} has no layer_idx, so its keys and values cannot be given a cache slot")
    return layer


def _same(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)

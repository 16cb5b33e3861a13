"""Check that attention is the only place where a token's row depends on other rows.

A cache can then stand for all earlier tokens. A convolution, a recurrence or a pooling over the sequence
cannot be continued from keys and values, so it is refused by name. Judged from symbolic shapes: the
dimensions that hold rows are those whose size is not a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from specqd.errors import CaptureError

from .normalise import place

__all__ = ["check_rows_independent"]

aten = torch.ops.aten


def _named(names: str) -> set[OpOverloadPacket]:
    return {getattr(aten, name) for name in names.split()}


_CONTRACTIONS = {aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
_ALONG_A_DIMENSION = _named("""
    _log_softmax _softmax all amax amin any argmax argmin argsort cummax cummin cumprod cumsum diff flip
    gather index_add index_select log_softmax logcumsumexp logsumexp max mean min narrow prod roll
    scatter select select_scatter slice slice_scatter softmax sort std sum topk unfold var
""")
_ELEMENTWISE = {aten.max.other, aten.min.other}
_NEVER = _named("""
    arange avg_pool1d cdist conv1d conv2d conv_transpose1d convolution einsum gru index_put lstm
    masked_scatter max_pool1d nonzero scaled_dot_product_attention tril triu
""")


def check_rows_independent(graph: fx.Graph) -> None:
    """Raise CaptureError naming the first operator, other than attention, that mixes rows or counts them."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and _mixes(node):
            raise CaptureError(
                f"{place(node)}: {node.target} mixes tokens outside of attention, so decoding cannot go on "
                "from cached keys and values; specqd compiles plain attention decoders only"
            )


def _mixes(node: fx.Node) -> bool:
    packet, shape = node.target.overloadpacket, _shape(node.args[0] if node.args else None)
    if packet in _NEVER:
        return any(_is_row(size) for size in (*shape, *_shape(node)))
    if packet in _CONTRACTIONS:
        left = _shape(node.args[1]) if packet in (aten.addmm, aten.baddbmm) else shape
        return bool(left) and _is_row(left[-1])
    if packet is aten.pad or packet is aten.constant_pad_nd:
        return any(_is_row(size) for size in shape[len(shape) - len(node.args[1]) // 2 :])
    if packet is aten.index:
        return any(_is_row(s) for s, at in zip(shape, node.args[1], strict=False) if at is not None)
    if packet in _ALONG_A_DIMENSION and node.target not in _ELEMENTWISE:
        return any(_is_row(shape[d]) for d in _dimensions(node, len(shape)))
    return False


def _dimensions(node: fx.Node, rank: int) -> list[int]:
    """Dimensions that an operator with an argument `dim`, `dims` or none runs along."""
    names = [a.name for a in node.target._schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    name = next((n for n in ("dim", "dims", "dimension") if n in names), None)
    dims = given.get(name, defaults[name]) if name else None
    if dims is None or dims == []:
        return list(range(rank))
    return [int(d) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _shape(value: Any) -> tuple[Any, ...]:
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def _is_row(size: Any) -> bool:
    return isinstance(size, torch.SymInt)

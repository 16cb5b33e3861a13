"""Check that attention is the only place where a token's row depends on other rows.

A cache can then stand for all earlier tokens. A convolution, a recurrence or a pooling over the sequence
cannot be continued from keys and values, so it is refused by name. Judged from symbolic shapes: the
dimensions that hold rows are those whose size is not a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from specqd.errors import CaptureError
from specqd.mixing import mixes

from .normalise import place

__all__ = ["check_rows_independent"]


def check_rows_independent(graph: fx.Graph) -> None:
    """Raise CaptureError naming the first operator, other than attention, that mixes rows or counts them."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and mixes(node, _rows):
            raise CaptureError(
                f"{place(node)}: {node.target} mixes tokens outside of attention, so decoding cannot go on "
                "from cached keys and values; specqd compiles plain attention decoders only"
            )


def _rows(value: Any) -> tuple[bool, ...]:
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(isinstance(size, torch.SymInt) for size in getattr(tensor, "shape", ()))

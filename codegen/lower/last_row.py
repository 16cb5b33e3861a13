"""Narrow a graph to the logits of its last row, for prefill."""

from __future__ import annotations

import torch
from torch import fx

from specqd.program import Entry

__all__ = ["last_row"]

aten = torch.ops.aten


def last_row(entry: Entry) -> Entry:
    """Return a copy whose output head reads only the last token: its logits are `[1, 1, vocab]`.

    The cut is made before the last matrix product on the way to the output, the largest of a language model.
    """
    copy = entry.copy()
    output = next(n for n in copy.graph.nodes if n.op == "output")
    node = output.args[0] if isinstance(output.args[0], fx.Node) else output.args[0][0]
    while "linear" not in str(node.target):
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        if len(inputs) != 1:
            return copy
        node = inputs[0]
    x = node.args[0]
    with copy.graph.inserting_before(node):
        last = copy.graph.call_function(aten.slice.Tensor, (x, len(x.meta["val"].shape) - 2, -1, 2**63 - 1))
    node.update_arg(0, last)
    return copy

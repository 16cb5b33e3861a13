"""How the matrix of a product is read: densely, or without its zeros where that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specqd.codegen.pack import Packed, sparse
from specqd.codegen.sparse_kernels import PRECISIONS, Sparse, choose
from specqd.codegen.tir import i32

__all__ = ["matrix", "users"]


def matrix(f: Any, weight: fx.Node, dense: Packed) -> tuple[Any, Any]:
    """Return what a kernel reads a weight from and its first element; `dense` is how it would lie densely.

    A weight that more than linears read, such as a tied embedding, stays dense: one copy serves all.
    """
    choice = choose([f.program.weights[name] for name in dense.sources], dense.form, f.isa)
    if choice.form is None or any(u.target not in _LINEARS for u in users(f, weight)):
        return f.step.weight(dense)
    parts = map(f.step.weight, sparse(dense.sources, dense.form, choice.form, choice.sizes))
    buffers, offsets = zip(*parts, strict=True)
    return Sparse(choice.form, PRECISIONS[dense.form].bits, buffers, offsets), i32(0)


def users(f: Any, weight: fx.Node) -> list[fx.Node]:
    """Nodes of any entry that read the weight a get_attr node stands for."""
    graphs = [e.graph for e in f.program.entries.values()]
    return [
        u for g in graphs for n in g.find_nodes(op="get_attr") if n.target == weight.target for u in n.users
    ]


_LINEARS = {
    torch.ops.aten.linear.default,
    torch.ops.specqd.linear_int8.default,
    torch.ops.specqd.linear_mxfp4.default,
}

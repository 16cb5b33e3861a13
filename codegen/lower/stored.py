"""How the matrix of a product is read: densely, or without its zeros where that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specqd.codegen.pack import Packed
from specqd.codegen.sparse_kernels import PARTS, PRECISIONS, Sparse, choose
from specqd.codegen.tir import i32

__all__ = ["matrix", "users"]


def matrix(f: Any, weight: fx.Node, dense: Packed) -> tuple[Any, Any]:
    """Return what a kernel reads a weight from and its first element; `dense` is how it would lie densely.

    A weight that more than linears read, such as a tied embedding, stays dense: one copy serves all.
    """
    choice = choose([f.program.weights[name] for name in dense.sources], dense.form, f.isa)
    if choice.form is None or any(u.target not in _LINEARS for u in users(f, weight)):
        return f.step.weight(dense)
    bits = PRECISIONS[dense.form].bits
    dtypes = (f"int{bits}", f"uint{8 * choice.form.mask_bytes(PRECISIONS[dense.form].inputs)}", "int32")
    parts = [
        f.step.weight(Packed(dense.sources, f"{dense.form}-{choice.form.name}-{part}", dtype, size))
        for part, dtype, size in zip(PARTS, dtypes, choice.sizes, strict=True)
    ]
    buffers, offsets = zip(*parts, strict=True)
    return Sparse(f.isa, choice.form, bits, buffers, offsets), i32(0)


def users(f: Any, weight: fx.Node) -> list[fx.Node]:
    """Nodes of any entry that read the weight a get_attr node stands for."""
    graphs = [e.graph for e in f.program.entries.values()]
    return [
        u
        for g in graphs
        for n in g.nodes
        if n.op == "get_attr" and n.target == weight.target
        for u in n.users
    ]


_LINEARS = {
    torch.ops.aten.linear.default,
    torch.ops.specqd.linear_int8.default,
    torch.ops.specqd.linear_mxfp4.default,
}

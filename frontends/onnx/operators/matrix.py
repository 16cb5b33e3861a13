"""Products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__: list[str] = []


@rule("MatMul")
def _matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@rule("Gemm")
def _gemm(
    node: Node, a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0,
    transA: int = 0, transB: int = 0,  # noqa: N803
) -> Tensor:  # fmt: skip
    """`alpha A B + beta C`; a linear layer where it is one."""
    x = a.transpose(0, 1) if transA else a
    bias = None if c is None else c if beta == 1 else c * beta
    if alpha == 1 and transB and (bias is None or bias.dim() == 1):
        return torch.nn.functional.linear(x, b, bias)
    product = torch.matmul(x, b.transpose(0, 1) if transB else b)
    product = product if alpha == 1 else product * alpha
    return product if bias is None else product + bias


@rule("Einsum")
def _einsum(node: Node, *inputs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *inputs)


@rule("Det")
def _det(node: Node, x: Tensor) -> Tensor:
    """Expanded along rows, which small matrices can afford."""
    size = x.shape[-1]
    if not isinstance(size, int) or size > 4:
        raise CaptureError(f"{node}: determinants of more than 4 x 4 are not compiled")
    return _minors(x)


def _minors(x: Tensor) -> Tensor:
    size = x.shape[-1]
    if size == 1:
        return x[..., 0, 0]
    total = torch.zeros(x.shape[:-2], dtype=x.dtype)
    for at in range(size):
        rest = torch.cat([x[..., 1:, :at], x[..., 1:, at + 1 :]], -1)
        part = x[..., 0, at] * _minors(rest)
        total = total - part if at % 2 else total + part
    return total

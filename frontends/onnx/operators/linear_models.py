"""Linear models of the domain ai.onnx.ml, as scikit-learn's converters write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__: list[str] = []

_DOMAIN = "ai.onnx.ml"


@rule("Scaler", domain=_DOMAIN)
def _scaler(
    node: Node, x: Tensor, *, offset: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)
) -> Tensor:
    return (x.float() - torch.tensor(offset)) * torch.tensor(scale)


@rule("Normalizer", domain=_DOMAIN)
def _normalizer(node: Node, x: Tensor, *, norm: str = "MAX") -> Tensor:
    """Divide rows by their norm; rows of zeros stay, and a maximum keeps its sign."""
    x = x.float()
    if norm == "MAX":
        by = x.amax(-1, keepdim=True)
    else:
        by = torch.linalg.vector_norm(x, {"L1": 1, "L2": 2}[norm], -1, keepdim=True)
    return torch.where(by == 0, x, x / by)


@rule("LinearRegressor", domain=_DOMAIN)
def _regressor(
    node: Node, x: Tensor, *, coefficients: Sequence[float], intercepts: Sequence[float] = (), targets: int = 1,
    post_transform: str = "NONE",
) -> Tensor:  # fmt: skip
    return _transformed(node, _planes(node, x, coefficients, intercepts, targets), post_transform)


@rule("LinearClassifier", domain=_DOMAIN)
def _classifier(
    node: Node, x: Tensor, *, coefficients: Sequence[float], intercepts: Sequence[float] = (),
    classlabels_ints: Sequence[int] = (), classlabels_strings: Sequence[str] = (), multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The label of the largest score, and all scores."""
    if classlabels_strings:
        raise CaptureError(f"{node}: labels that are strings are not compiled; number the classes")
    scores = _planes(node, x, coefficients, intercepts, len(classlabels_ints))
    labels = torch.tensor(classlabels_ints)[scores.argmax(-1)]
    return labels, _transformed(node, scores, post_transform)


def _planes(
    node: Node, x: Tensor, coefficients: Sequence[float], intercepts: Sequence[float], count: int
) -> Tensor:
    """Return the distances `[samples, count]` from planes of which each has a row of coefficients."""
    width = x.shape[-1]
    if not isinstance(width, int) or len(coefficients) != count * width:
        raise CaptureError(
            f"{node}: {len(coefficients)} coefficients are not those of {count} planes in {width} dimensions"
        )
    table = torch.tensor(coefficients).reshape(count, width)
    return torch.nn.functional.linear(x.float(), table, torch.tensor(intercepts) if intercepts else None)


def _transformed(node: Node, scores: Tensor, how: str) -> Tensor:
    if how == "NONE":
        return scores
    if how == "LOGISTIC":
        return scores.sigmoid()
    if how == "SOFTMAX":
        return scores.softmax(-1)
    raise CaptureError(f"{node}: post_transform {how} is not compiled; NONE, LOGISTIC and SOFTMAX are")

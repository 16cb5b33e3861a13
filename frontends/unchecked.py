"""Functions of torch that look at values only to refuse some, captured without that look."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

__all__ = ["Unchecked"]


class Unchecked(TorchFunctionMode):
    """Calls `UNCHECKED[function]` instead of a function: a graph has no branches on data."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, or what stands for it."""
        return UNCHECKED.get(func, func)(*args, **(kwargs or {}))


def _gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    """F.gaussian_nll_loss of variances that may be negative, and count as `eps` then."""
    if not isinstance(var, Tensor):
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)
    if var.shape == input.shape[:-1] != input.shape:
        var = var[..., None]
    var = var.clamp(min=eps)
    loss = 0.5 * (var.log() + (input - target) ** 2 / var) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


UNCHECKED: dict[Callable[..., Any], Callable[..., Any]] = {F.gaussian_nll_loss: _gaussian_nll_loss}

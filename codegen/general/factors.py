"""What a kernel multiplies: float32, or the codes behind it where an activation and a weight have some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from specqd.codegen.general.codes import DEQUANTIZE, is_read, reads_channels
from specqd.codegen.general.values import Value

__all__ = ["Factors", "factors"]


@dataclass(frozen=True)
class Factors:
    """An activation and a constant weight, of float32, BF16 or integers.

    Attributes:
        scale: for integers, float32 `[output channels]`: what a product of two codes counts.
        zero: the code that stands for 0 in the activation.
    """

    x: Value
    weight: Value
    scale: np.ndarray | None = None
    zero: int = 0

    @property
    def dtype(self) -> str:
        """That of the activation."""
        return self.x.dtype


def factors(values: dict[fx.Node, Any], x: fx.Node, weight: fx.Node, axis: int, real: Factors) -> Factors:
    """Return what a product of two nodes multiplies, whose output channels are dimension `axis` of the weight.

    Codes are taken if both are BF16, or if both are integers and the weight is constant, with a scale an output
    channel, around 0; else it is `real`.
    """
    if is_read(x) and is_read(weight) and weight.args[0].meta["val"].dtype is torch.bfloat16:
        short = Factors(values[x.args[0]], values[weight.args[0]])
        return short if short.dtype == short.weight.dtype else real
    if not is_read(x) or x.target is not DEQUANTIZE or not reads_channels(weight):
        return real
    codes, scales, zeros, at, *_ = weight.args
    kept = values.get(codes)
    if zeros is not None or at != axis or kept is None or kept.data is None or kept.dtype != "int8":
        return real
    scale = values[scales].data.contents.numpy() * np.float32(x.args[1])
    return Factors(values[x.args[0]], kept, scale, int(x.args[2]))

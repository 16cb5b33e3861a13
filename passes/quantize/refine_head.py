"""refine-head: logits from an MXFP4 head, the largest of them computed again exactly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from specqd.errors import InputError
from specqd.ops import REFINED_TOGETHER
from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import arguments, calls, head, weight_of
from specqd.passes.rewrite import add_weight, read_weight, replace
from specqd.program import Entry, Program

from . import mxfp4

__all__ = ["RefineHead"]

aten, ops = torch.ops.aten, torch.ops.specqd
_WORTH = 4  # a head with fewer times the channels computed again saves too little


class RefineHead(Pass):
    """Preview the logits with an MXFP4 copy of the head; compute the best of them again from the head itself.

        linear(x, w, bias)  ->  linear_refined(x, w.mxfp4_blocks, w.mxfp4_scales, w, bias, best)

    A draft's choice is nearly always among the best of the preview, so it is as good as with the exact head, which
    is read in a few places only (after Shim et al., "SVD-softmax", 2017, with rounding in place of an SVD). Put it
    before the cast of the other matrices.

    1. Only the head is rewritten, the linear that makes the logits.
    2. Refused: a head that is cast already or computed, of other dtypes than bfloat16 and float32, whose input
       is no multiple of 32, or that is too small to gain.

    Attributes:
        best: groups of 16 neighbouring channels that are computed again.
        scale: how the exponent of a block's scale is chosen, see specqd.passes.quantize.mxfp4.
    """

    name = "refine-head"
    best: int = 64
    scale: mxfp4.ScaleRule = "search"

    def __post_init__(self) -> None:
        """Check the number."""
        super().__post_init__()
        if self.best < 1:
            raise InputError(f"{self.name}: cannot compute {self.best} groups again; give 1 or more")

    @property
    def lossless(self) -> bool:
        """All but the largest logits are rounded."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Rewrite the head, or say why not."""
        node = head(entry.graph)
        if node is None:
            output = next(n for n in reversed(entry.graph.nodes) if n.op == "output")
            yield Refusal(output.name, "the logits do not come from one linear")
            return
        reason = self._unsuitable(program, node)
        if reason:
            yield Refusal(node.name, reason)
            return
        name, given = str(weight_of(node)), arguments(node)
        blocks, scales = mxfp4.encode(program.weights[name], self.scale)
        parts = {"mxfp4_blocks": blocks, "mxfp4_scales": scales}
        weights = [read_weight(node, add_weight(program, f"{name}.{part}", t)) for part, t in parts.items()]
        changed = (given["input"], *weights, given["weight"], given["bias"], self.best)
        yield replace(node, ops.linear_refined.default, changed)

    def _unsuitable(self, program: Program, node: fx.Node) -> str | None:
        if not calls(node, aten.linear):
            return f"cast already: {node.target}"
        name = weight_of(node)
        if name is None:
            return "its weight is computed, not stored"
        weight = program.weights[name]
        channels, inputs = weight.shape
        if weight.dtype not in (torch.bfloat16, torch.float32):
            return f"its weight {name} is {weight.dtype}, not bfloat16 or float32"
        if inputs % mxfp4.BLOCK:
            return f"its input has {inputs} channels, not a multiple of {mxfp4.BLOCK}"
        again = self.best * REFINED_TOGETHER
        if channels < _WORTH * again:
            return f"of its {channels} channels {again} would be computed again, which saves too little"
        return None

"""refine-head: logits from an MXFP4 head, the largest of them computed again exactly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from specqd.errors import InputError
from specqd.ops import REFINED_TOGETHER
from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import arguments, head, weight_of
from specqd.program import Entry, Program

from . import mxfp4
from .cast_mxfp4 import packed, unsuitable

__all__ = ["WORTH", "RefineHead"]

ops = torch.ops.specqd
WORTH = 4
"""A head with fewer times the channels computed again saves too little."""


class RefineHead(Pass):
    """Preview the logits with an MXFP4 copy of the head; compute the best of them again from the head itself.

        linear(x, w, bias)  ->  linear_refined(x, w.mxfp4_blocks, w.mxfp4_scales, bias, w, best)

    A draft's choice is nearly always among the best of the preview, so it is as good as with the exact head, which
    is read in a few places only (after Shim et al., "SVD-softmax", 2017, with rounding in place of an SVD). Put it
    before the cast of the other matrices.

    1. Only the head is rewritten, the linear that makes the logits.
    2. Refused: a head that cast-mxfp4 could not cast, or that is too small to gain.

    Attributes:
        best: groups of 16 neighbouring channels that are computed again.
        scale: how the exponent of a block's scale is chosen, see specqd.passes.quantize.mxfp4.
    """

    name = "refine-head"
    for_language_models = True
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
        preview = mxfp4.encode(program.weights[str(weight_of(node))], self.scale)._asdict()
        exact = arguments(node)["weight"]
        yield packed(program, node, ops.linear_refined.default, "mxfp4", preview, exact, self.best)

    def _unsuitable(self, program: Program, node: fx.Node) -> str | None:
        reason = unsuitable(program, node, "mxfp4")
        if reason:
            return reason
        channels = len(program.weights[str(weight_of(node))])
        again = self.best * REFINED_TOGETHER
        if channels < WORTH * again:
            return f"of its {channels} channels {again} would be computed again, which saves too little"
        return None

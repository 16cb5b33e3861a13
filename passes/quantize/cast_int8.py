"""cast-int8: store the matrices of an entry in INT8, with a scale a row."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import calls
from specqd.program import Entry, Program

from .cast_mxfp4 import PRODUCTS, to_int8, unsuitable

__all__ = ["CastINT8"]


class CastINT8(Pass):
    """Cast weights of linears, the head's too, to INT8: symmetric, one scale a row, see specqd.passes.quantize.int8.

        linear(x, w, bias)  ->  linear_int8(x, w.int8_values, w.int8_scales, bias)

    A draft in INT8 reads twice as much as one in MXFP4 and is more often right.

    1. Every linear is cast as above.
    2. Other readers of the same weight, such as a tied embedding, keep the weight as it is.
    3. Refused as by cast-mxfp4, but rows may have any length.

    Attributes:
        keep: shell-style patterns of weight names to leave alone, e.g. `*.down_proj.*`.
    """

    name = "cast-int8"
    keep: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        """Rounding to 8 bits changes the logits."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Cast each linear, or say why not."""
        for node in [node for node in entry.graph.nodes if calls(node, *PRODUCTS)]:
            reason = unsuitable(program, node, "int8", self.keep)
            yield Refusal(node.name, reason) if reason else to_int8(program, node)

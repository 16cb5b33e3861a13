"""cast-mxfp4: store the matrices of an entry in MXFP4, without calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import fx

from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import LINEARS, arguments, calls, head, weight_of
from specqd.passes.rewrite import add_weight, read_weight, replace
from specqd.program import Entry, Program

from . import int8, mxfp4

__all__ = ["PRODUCTS", "CastMXFP4", "Decision", "Head", "cast", "decide", "packed", "to_int8", "unsuitable"]

Head = Literal["keep", "int8", "mxfp4"]
Decision = tuple[fx.Node, str | Refusal]
"""A product, and the form it is to be cast to or why it is left alone."""

aten, ops = torch.ops.aten, torch.ops.specqd
PRODUCTS = (*LINEARS, aten.addmm, aten.mm, aten.matmul, aten.bmm)
"""What multiplies matrices."""


class CastMXFP4(Pass):
    """Cast weights of linears to MXFP4: blocks of 32 along the input, see specqd.passes.quantize.mxfp4.

        linear(x, w, bias)  ->  linear_mxfp4(x, w.mxfp4_blocks, w.mxfp4_scales, bias)

    1. Every linear is cast as above, except the head, the linear that makes the logits.
    2. The head, by the option `lm_head`: kept, cast to MXFP4 as above, or cast to INT8 with one scale a row,
       linear_int8(x, w.int8_values, w.int8_scales, bias). One that refine-head has seen to stays as it is.
    3. Other readers of the same weight, such as a tied embedding, keep the weight as it is.

    Refused: weights that `keep` names, weights that are computed, rows that are no multiple of 32, dtypes
    other than float ones, what is cast already, and products other than linears (conv1d-to-linear helps
    GPT-2).

    Attributes:
        scale: how the exponent of a block's scale is chosen.
        lm_head: what becomes of the head.
        keep: shell-style patterns of weight names to leave alone, e.g. `*.down_proj.*`.
    """

    name = "cast-mxfp4"
    scale: mxfp4.ScaleRule = "floor"
    lm_head: Head = "int8"
    keep: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        """Rounding to 4 bits changes the logits."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Cast each linear, or say why not."""

        def encode(node: fx.Node) -> mxfp4.MXFP4:
            return mxfp4.encode(program.weights[str(weight_of(node))], self.scale)

        yield from cast(program, decide(program, entry, self.lm_head, self.keep), encode)


def decide(program: Program, entry: Entry, lm_head: Head, keep: tuple[str, ...]) -> list[Decision]:
    """Say for each product of an entry what it is to be cast to, or why it is left alone; changes nothing."""
    last = head(entry.graph)
    decided: list[Decision] = []
    for node in entry.graph.nodes:
        if calls(node, *PRODUCTS) and not calls(node, ops.linear_refined.default):
            form = lm_head if node is last else "mxfp4"
            reason = unsuitable(program, node, form, keep)
            decided.append((node, Refusal(node.name, reason) if reason else form))
    return decided


def cast(
    program: Program, decided: list[Decision], encode: Callable[[fx.Node], mxfp4.MXFP4]
) -> Iterator[fx.Node | Refusal]:
    """Do what was decided; `encode` gives the MXFP4 weight of a linear."""
    for node, form in decided:
        if isinstance(form, Refusal):
            yield form
        elif form == "int8":
            yield to_int8(program, node)
        else:
            yield packed(program, node, ops.linear_mxfp4.default, "mxfp4", encode(node)._asdict())


def to_int8(program: Program, node: fx.Node) -> fx.Node:
    """Cast the weight of a linear to INT8; return the new node."""
    values, scales = int8.encode(program.weights[str(weight_of(node))])
    parts = {"values": values, "scales": scales}
    return packed(program, node, ops.linear_int8.default, "int8", parts)


def unsuitable(program: Program, node: fx.Node, form: str, keep: tuple[str, ...] = ()) -> str | None:
    """Say why a product cannot be cast to a form ("keep", "int8", "mxfp4"), or None."""
    if not calls(node, aten.linear):
        return _not_linear(node)
    name = weight_of(node)
    if name is None:
        return "its weight is computed, not stored"
    kept = next((glob for glob in keep if fnmatchcase(name, glob)), None)
    if form == "keep" or kept:
        return f"kept: {name} matches {kept}" if kept else "kept: it is the head, and lm_head=keep"
    weight = program.weights[name]
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weight {name} is {weight.dtype}, not a float"
    if form == "mxfp4" and weight.shape[-1] % mxfp4.BLOCK:
        return f"its input has {weight.shape[-1]} channels, not a multiple of {mxfp4.BLOCK}"
    return None


def _not_linear(node: fx.Node) -> str:
    if calls(node, *LINEARS):
        return f"cast already: {node.target}"
    if calls(node, aten.addmm, aten.mm):
        return "its weight is stored as [inputs, outputs]; put conv1d-to-linear first"
    return "it is a product of two activations or of gathered weights, not a linear"


def packed(
    program: Program,
    node: fx.Node,
    target: torch._ops.OpOverload,
    form: str,
    parts: Mapping[str, torch.Tensor],
    *more: fx.Node | int,
) -> fx.Node:
    """Put `target(input, parts of the weight, bias, *more)` in the place of a linear; return the new node."""
    names = [
        add_weight(program, f"{weight_of(node)}.{form}_{part}", tensor) for part, tensor in parts.items()
    ]
    weights = [read_weight(node, name) for name in names]
    given = arguments(node)
    return replace(node, target, (given["input"], *weights, given["bias"], *more))

"""cast-bf16: convolutions and linears of a module multiply BF16 and add up float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import changed, shapes, weight_of
from specqd.passes.rewrite import add_weight, read_weight
from specqd.program import Entry, Program

from .products import candidates, put_behind
from .rounded_tensors import rounded_tensors

__all__ = ["CastBF16"]

aten = torch.ops.aten


class CastBF16(Pass):
    """Round what convolutions and linears multiply to BF16; sums stay float32.

        conv(x, w, b), linear(x, w, b)  ->  the same of float32(bfloat16(x)), float32(w.bf16), b

    In eager torch that is float32 arithmetic on rounded numbers, as CPUs with BF16 do it: products of two BF16 are
    exact in float32. In compiled code activations stay in BF16 from layer to layer.

    1. Rounded are inputs of products, ends of convolutions that additions and poolings read, and what is added to a
       product whose result is rounded.
    2. Refused: transposed convolutions and those of three dimensions; weights that are computed, not float32, not
       finite, or quantised already; inputs that are weights; and language models.

    Attributes:
        ignore: shell-style patterns of weight names to leave alone, e.g. `*.head.*`.
    """

    name = "cast-bf16"
    ignore: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        """BF16 has eight significant bits."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Cast each product, or say why not."""
        products: list[fx.Node] = []
        for node, reason in candidates(program, entry, self.ignore):
            if reason:
                yield Refusal(node.name, reason)
            else:
                products.append(node)
        if not products:
            return
        groups = rounded_tensors(entry.graph, products, shapes(program, entry).get)
        for product in products:
            name = str(weight_of(product))
            stored = add_weight(program, f"{name}.bf16", program.weights[name].bfloat16())
            codes = read_weight(product, stored)
            with product.graph.inserting_before(product):
                weight = _float32(product.graph, codes)
            product.args, product.kwargs = changed(product, weight=weight), {}
            yield product
        for node in (node for group in groups for node in group):
            put_behind(node, _bfloat16, _float32)


def _bfloat16(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.bfloat16})


def _float32(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float32})

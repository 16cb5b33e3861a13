"""quantize-int8: convolutions and linears of a module read and give INT8, as pairs of quantise and dequantise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import fx

from specqd.errors import InputError
from specqd.passes.contract import Note, Pass, Progress, Refusal
from specqd.passes.match import arguments, calls, changed, shapes, weight_of
from specqd.passes.prune.calibration_data import Data, Pixels, Samples
from specqd.passes.rewrite import add_weight, read_weight
from specqd.program import Entry, Program

from .affine import Affine
from .bias_correction import Rounded, mean_errors
from .int8 import encode
from .products import candidates, put_behind
from .ranges import Choice, Ranges
from .rounded_tensors import rounded_tensors, sources

__all__ = ["QuantizeINT8"]

quantized = torch.ops.quantized_decomposed


class QuantizeINT8(Pass):
    """Let convolutions and linears multiply INT8, after training, with scales from calibration data.

        conv(x, w, b), linear(x, w, b)  ->  the same of dequantize(quantize(x)), dequantize(w.int8_values), b

    The operators are `quantized_decomposed.*` of torch, which are QuantizeLinear and DequantizeLinear in ONNX. Compiled
    code multiplies the integers, and keeps activations in INT8 from layer to layer.

    1. Weights are symmetric, with a scale an output channel (see specqd.passes.quantize.int8); zeros stay zeros.
    2. Activations have a scale a tensor, in uint8 with a zero point or in int8 around 0. Quantised are inputs of
       products, ends of convolutions that additions and poolings read, and what is added to a product whose result is
       quantised. Views and maximum pooling keep the scale; parts of a concatenation share one.
    3. With `bias_correction`, biases take off the mean of the error that rounding makes in each output channel.
    4. Refused: transposed convolutions and those of three dimensions; weights that are computed, not float32, not
       finite, or quantised already; inputs that are weights, not float32, or not finite on the data; language models.

    Attributes:
        data: what goes into the model.
        samples: how many images to take of the data.
        ranges: of activations, `minmax`, `percentile` or `mse`: all values, most, or those with the least error.
        percentile: of values that the range of `percentile` has below its end.
        activations: `asymmetric` (uint8) or `symmetric` (int8).
        bias_correction: see above.
        first: quantise the first product.
        last: quantise the last product.
        ignore: shell-style patterns of weight names to leave alone, e.g. `*.head.*`.
        pixels: what the model takes for a pixel's 0 to 255.
        seed: chooses the data.
    """

    name = "quantize-int8"
    data: Data = Data()
    samples: int = 64
    ranges: Ranges = "mse"
    percentile: float = 99.99
    activations: Literal["asymmetric", "symmetric"] = "asymmetric"
    bias_correction: bool = True
    first: bool = True
    last: bool = True
    ignore: tuple[str, ...] = ()
    pixels: Pixels = "imagenet"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not 50 < self.percentile <= 100:
            raise InputError(
                f"{self.name}: a percentile of {self.percentile} cannot be used; give more than 50, up to 100"
            )

    @property
    def lossless(self) -> bool:
        """Rounding to 8 bits changes the outputs."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Note | Progress]:
        """Choose what is quantised, find scales on the data, then put the pairs in."""
        products: list[fx.Node] = []
        found = list(candidates(program, entry, self.ignore))
        for node, reason in found:
            left = reason or self._left(node, [product for product, _ in found])
            if left:
                yield Refusal(node.name, left)
            else:
                products.append(node)
        if not products:
            return
        batches = self.data.batches(program, entry, Samples(self.samples, self.seed, self.pixels))
        choice = Choice(self.ranges, self.percentile, self.activations == "symmetric")
        groups = rounded_tensors(entry.graph, products, shapes(program, entry).get)
        scales = yield from choice.of(program, entry, groups, batches)
        rounded: dict[fx.Node, Rounded] = {}
        for product in products:
            known = [_known(source, scales) for source in sources(product.args[0])]
            if known[0] is None or None in known:
                yield Refusal(
                    product.name, "its input is not float32, or NaN or infinite on the calibration data"
                )
            else:
                weight = program.weights[str(weight_of(product))]
                rounded[product] = Rounded(known[0], *encode(weight.flatten(1)))
        if not rounded:
            return
        errors = (yield from mean_errors(program, entry, rounded, batches)) if self.bias_correction else {}
        for product, kept in rounded.items():
            _read_int8(program, product, kept, errors.get(product))
            yield product
        for node, scale in scales.items():
            put_behind(
                node,
                _call(quantized.quantize_per_tensor.default, scale),
                _call(quantized.dequantize_per_tensor.default, scale),
            )
        yield Note("", f"{len(rounded)} products in INT8, {len(scales)} activations")

    def _left(self, node: fx.Node, products: list[fx.Node]) -> str | None:
        for kept, at in ((self.first, 0), (self.last, -1)):
            if not kept and node is products[at]:
                return f"it is the {'last' if at else 'first'} product"
        return None


def _known(node: fx.Node, found: Mapping[fx.Node, Affine]) -> Affine | None:
    """Return how a value is quantised, by this pass or before."""
    if calls(node, quantized.dequantize_per_tensor):
        return Affine(*node.args[1:6])
    return found.get(node)


def _read_int8(program: Program, product: fx.Node, rounded: Rounded, error: torch.Tensor | None) -> None:
    """Let a product read its weight in INT8, and add `error`, by output channel, to its bias."""
    name, bias = str(weight_of(product)), arguments(product)["bias"]
    stored = {"values": rounded.values.reshape(program.weights[name].shape), "scales": rounded.scales}
    parts = [
        read_weight(product, add_weight(program, f"{name}.int8_{part}", t)) for part, t in stored.items()
    ]
    with product.graph.inserting_before(product):
        weight: Any = product.graph.call_function(
            quantized.dequantize_per_channel.default, (*parts, None, 0, -127, 127, torch.int8)
        )
    if error is not None:
        old = 0 if bias is None else program.weights[str(bias.target)]
        bias = read_weight(product, add_weight(program, f"{name}.int8_bias", old + error))
    product.args, product.kwargs = changed(product, weight=weight, bias=bias), {}


def _call(target: Any, scale: Affine) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, x: graph.call_function(target, (x, *scale))

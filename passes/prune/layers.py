"""What can be pruned: convolutions and linears as matrices, of which each row makes one output channel."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from specqd.errors import InputError
from specqd.passes.contract import Refusal
from specqd.passes.match import LINEARS, arguments, calls, weight_of, weight_uses
from specqd.passes.rewrite import add_weight, read_weight
from specqd.program import Entry, Program

__all__ = ["NOT_FINITE", "Layer", "left_out", "parted", "prunable", "store", "treated"]

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
_TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
NOT_FINITE = "its input is NaN or infinite on the calibration data"
_REASONS = 4  # that `left_out` tells; each pass's refusals have them all


@dataclass(frozen=True)
class Layer:
    """A weight [N, C, ...], and the products that read it, all with the same number of groups.

    Its matrix is [groups, N / groups, K]: K counts the kernel's positions and, inside of each, a group's channels.
    """

    weight: str
    nodes: tuple[fx.Node, ...]
    shape: torch.Size
    groups: int

    @property
    def name(self) -> str:
        """The name of its first product."""
        return str(self.nodes[0].name)

    @property
    def bias(self) -> str | None:
        """Name of the stored bias of its product, if it has only one product."""
        bias = arguments(self.nodes[0])["bias"]
        return (
            str(bias.target) if len(self.nodes) == 1 and bias is not None and bias.op == "get_attr" else None
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """Turn a weight into its matrix."""
        split = weight.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
        return split.transpose(2, 3).flatten(2)

    def restored(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn a matrix into a weight."""
        split = matrix.reshape(*matrix.shape[:2], -1, self.shape[1])
        return split.transpose(2, 3).reshape(self.shape).to(dtype).contiguous()

    def rows(self, node: fx.Node, x: Tensor) -> Tensor:
        """Return what the rows of the matrix are multiplied with, [groups, samples * positions, K], for an input."""
        if calls(node, aten.linear):
            return x.reshape(1, -1, x.shape[-1])
        given, kernel = arguments(node), self.shape[2:]
        x = F.pad(x if x.dim() == len(self.shape) else x[None], _padding(given, kernel))
        strides, dilations = _each(given["stride"], kernel), _each(given["dilation"], kernel)
        for dim, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
            x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
        places, kernels = range(3, 3 + len(kernel)), range(3 + len(kernel), 3 + 2 * len(kernel))
        patches = x.unflatten(1, (self.groups, -1)).permute(1, 0, *places, *kernels, 2)
        return patches.reshape(self.groups, -1, self.shape[1:].numel())


def _each(value: Any, kernel: tuple[int, ...]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * len(kernel) if len(values) == 1 else values


def _padding(given: dict[str, Any], kernel: tuple[int, ...]) -> list[int]:
    """Zeros before and after each dimension, the last dimension first, as torch.nn.functional.pad takes them."""
    padding, dilations = given["padding"], _each(given["dilation"], kernel)
    if padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilations, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(n, n) for n in _each(0 if padding == "valid" else padding, kernel)]
    return [n for pair in reversed(pairs) for n in pair]


def prunable(program: Program, entry: Entry, ignore: tuple[str, ...] = ()) -> list[Layer | Refusal]:
    """Return each weight of a convolution or linear as a layer, or why it is none, in the order of the graph.

    A weight that several products read is one layer.

    Args:
        program: holds the weights.
        entry: whose graph holds the products.
        ignore: shell-style patterns of weight names to leave alone.

    Raises:
        InputError: a pattern matches no weight of a convolution or linear.
    """
    products = [n for n in entry.graph.nodes if calls(n, *_CONVOLUTIONS, *_TRANSPOSED, *LINEARS)]
    names = list(filter(None, map(weight_of, products)))
    for pattern in ignore:
        if not fnmatch.filter(names, pattern):
            some = ", ".join(names[:3]) or "none"
            raise InputError(f"ignore={pattern} matches no weight of a convolution or linear, such as {some}")
    found: list[Layer | Refusal] = []
    seen: set[str] = set()
    for node in products:
        reason = _unsuitable(program, entry, node, ignore)
        name = str(weight_of(node))
        if reason:
            found.append(Refusal(node.name, reason))
        elif name not in seen:
            seen.add(name)
            groups = arguments(node).get("groups", 1)
            found.append(
                Layer(name, tuple(weight_uses(entry.graph, name)), program.weights[name].shape, groups)
            )
    return found


def parted(
    found: Sequence[Layer | Refusal], unfit: Callable[[Layer], str | None]
) -> tuple[list[Layer], list[Refusal]]:
    """Part what `prunable` found into layers and refusals; `unfit` says why a pass leaves a layer alone, if it does."""
    layers: list[Layer] = []
    refused: list[Refusal] = []
    for one in found:
        if isinstance(one, Refusal):
            refused.append(one)
        elif why := unfit(one):
            refused.append(Refusal(one.name, why))
        else:
            layers.append(one)
    return layers, refused


def left_out(refusals: Sequence[Refusal]) -> str:
    """Say how many products a pass left alone, and how many for each reason; nothing where there are none."""
    if not refusals:
        return ""
    reasons = Counter(refusal.why for refusal in refusals).most_common()
    told = [f"{why} ({count})" for why, count in reasons[:_REASONS]]
    more = len(refusals) - sum(count for _, count in reasons[:_REASONS])
    return f"; {len(refusals)} left alone: {', '.join([*told, f'others ({more})'] if more else told)}"


def _unsuitable(program: Program, entry: Entry, node: fx.Node, ignore: tuple[str, ...]) -> str | None:
    name = weight_of(node)
    if calls(node, *_TRANSPOSED):
        return "transposed convolutions are not pruned"
    if not calls(node, *_CONVOLUTIONS, aten.linear):
        return "its weight is quantised already; prune before that"
    if name is None:
        return "its weight is computed, not stored"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
        return f"{name} is ignored"
    uses = weight_uses(entry.graph, name)
    other = next((use for use in uses if use.target is not node.target or weight_of(use) != name), None)
    if other is not None or len({arguments(use).get("groups", 1) for use in uses if use is not other}) > 1:
        return f"{(other or node).name} reads {name} in another way"
    weight = program.weights[name]
    if not weight.is_floating_point() or not weight.isfinite().all():
        return f"{name} holds NaN, infinity or no floating-point numbers"
    return None


def store(program: Program, entry: Entry, layer: Layer, name: str, tensor: Tensor) -> None:
    """Give a layer another tensor in the place of the weight or bias `name`, and keep that one as the dense one.

    It has the same name, unless another entry reads that too.
    """
    others = (e for e in program.entries.values() if e.name != entry.name)
    new = name
    if any(weight_uses(other.graph, name) for other in others):
        new = add_weight(program, f"{name}.pruned", tensor)
        for node in layer.nodes:
            for at in (
                at for at, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.target == name
            ):
                node.update_arg(at, read_weight(node, new))
    program.dense.setdefault(new, program.dense.get(name, program.weights[name]))
    program.weights[new] = tensor


def treated(program: Program, entry: Entry, layer: Layer, *passes: str) -> bool:
    """Say whether one of the passes changed or measured the layer after `sparsify` last changed it."""
    for event in (event for event in reversed(program.history) if event.entry == entry.name):
        kind = event.step.partition("{")[0]
        if kind in passes and layer.name in [*event.rewritten, *(node for node, _ in event.noted)]:
            return True
        if kind == "sparsify" and layer.name in event.rewritten:
            return False
    return False

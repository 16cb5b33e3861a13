"""What of a clip's graph is computed of each frame alone: where frames lie in a value, and how many fewer there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sympy import Expr, Integer, Symbol
from torch import fx
from torch.fx.node import map_arg

from specqd.mixing import is_judged, mixes
from specqd.program import Entry, Program
from specqd.reference import captured_inputs, fake_values

from .match import arguments, calls

__all__ = ["FrameWise", "Frames", "clip_size", "with_sizes"]

aten = torch.ops.aten

_RESHAPES = (aten.flatten, aten.reshape, aten.unflatten, aten.view)


class Frames(NamedTuple):
    """Where the frames of a frame-wise value lie.

    Attributes:
        dim: the dimension that has one index a frame.
        lost: how many indices fewer than the clip has frames.
        late: how many of the last frames were left out of what it is a slice of; None where it is no slice.
    """

    dim: int
    lost: int
    late: int | None = None


class FrameWise:
    """An entry with one open size, that of the clip.

    Attributes:
        size: the symbol of how many frames a clip has.
        values: what each node computes, without data.
        found: the values that are frame-wise, with where their frames lie.
        why: of each operator that reads frame-wise values and is not, what stands against it.
    """

    def __init__(self, program: Program, entry: Entry, size: Symbol, mode: Any, given: list[Any]) -> None:
        """Look at each node in order."""
        self.size = size
        self.values: Mapping[fx.Node, Any] = fake_values(program, entry, mode, given)
        self.found: dict[fx.Node, Frames] = {}
        self.why: dict[fx.Node, str] = {}
        self._dependent: set[fx.Node] = set()
        for node in entry.graph.nodes:
            if node.op == "placeholder":
                self._dependent.add(node)
                dim = self._only_dim(node)
                if dim is not None:
                    self.found[node] = Frames(dim, 0)
            elif node.op == "call_function" and self._dependent.intersection(node.all_input_nodes):
                self._look(node)

    def _look(self, node: fx.Node) -> None:
        value = self.values.get(node)
        if not isinstance(value, torch.Tensor | tuple | list):
            return  # a size
        self._dependent.add(node)
        sources = [n for n in node.all_input_nodes if isinstance(self.values[n], torch.Tensor)]
        of_frames = [n for n in sources if n in self.found]
        if not of_frames:
            return
        frames = self._sliced(node) or self._frames(node, sources)
        if isinstance(frames, str):
            self.why[node] = frames
        else:
            self.found[node] = frames

    def _sliced(self, node: fx.Node) -> Frames | None:
        """Read a slice that leaves some of the first and the last frames out."""
        if not calls(node, aten.slice):
            return None
        given = arguments(node)
        source = self.found.get(given["self"])
        if source is None or given["dim"] % self.values[node].dim() != source.dim or given["step"] != 1:
            return None
        whole, part = (self._lost(self.values[n], source.dim) for n in (given["self"], node))
        start = given["start"] or 0
        if part is None or whole is None or not isinstance(start, int) or start < 0:
            return None
        return Frames(source.dim, part, part - whole - start)

    def _frames(self, node: fx.Node, sources: list[fx.Node]) -> Frames | str:
        name, value = str(node.target).removeprefix("aten."), self.values[node]
        if not isinstance(value, torch.Tensor):
            return f"{name} gives several values"
        others = [n for n in sources if n not in self.found and (n in self._dependent or self._is_open(n))]
        if others:
            return f"{name} reads {others[0]}, which is of the whole clip"
        if not is_judged(node):
            return f"of {name} it is not known whether it mixes frames"
        if mixes(node, self._rows):
            return f"{name} mixes frames"
        dim, lost = self._only_dim(node), {self.found[n].lost for n in sources if n in self.found}
        if dim is None or {self._lost(value, dim)} != lost:
            return f"{name} gives no dimension with one index a frame"
        if calls(node, *_RESHAPES) and not self._in_order(node, dim):
            return f"{name} puts other things before the frames"
        return Frames(dim, *lost)

    def _in_order(self, node: fx.Node, dim: int) -> bool:
        source = node.args[0]
        before = self.values[source].shape[: self.found[source].dim].numel()
        return bool(before == self.values[node].shape[:dim].numel())

    def _rows(self, value: Any) -> tuple[bool, ...]:
        shape = getattr(self.values.get(value), "shape", ()) if isinstance(value, fx.Node) else ()
        return tuple(isinstance(size, torch.SymInt) for size in shape)

    def _is_open(self, node: fx.Node) -> bool:
        return any(self._rows(node))

    def _only_dim(self, node: fx.Node) -> int | None:
        rows = self._rows(node)
        return rows.index(True) if sum(rows) == 1 else None

    def _lost(self, value: torch.Tensor, dim: int) -> int | None:
        difference = self.size - _size(value.shape[dim])
        return int(difference) if difference.is_Integer and difference >= 0 else None


def clip_size(program: Program, entry: Entry) -> tuple[Symbol, Any, list[Any]] | str:
    """Return the one open size of an entry's inputs, with what `captured_inputs` gives; or what is wrong with it."""
    mode, given = captured_inputs(program, entry)
    sizes = [_size(s) for value in given for s in value.shape if isinstance(s, torch.SymInt)]
    symbols = dict.fromkeys(sizes)
    if len(symbols) != 1 or not sizes[0].is_Symbol:
        count = (
            "no size" if not symbols else f"more than the number of frames ({', '.join(map(str, symbols))})"
        )
        return f"{count} of its inputs is open: capture it with dynamic_shapes that open the dimension of the frames"
    return sizes[0], mode, given


def _size(size: Any) -> Expr:
    """Return a size as an expression of symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else Integer(int(size))


def with_sizes(argument: Any, values: Mapping[fx.Node, Any], number: Any) -> Any:
    """Replace sizes that a call's arguments read by numbers: `number(expression)`."""

    def fixed(node: fx.Node) -> Any:
        value = values.get(node)
        return number(_size(value)) if isinstance(value, torch.SymInt) else node

    return map_arg(argument, fixed)

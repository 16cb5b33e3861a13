"""stream-frames: from the graph of a clip to one of its newest frame, with what earlier ones gave as state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from specqd.errors import InputError
from specqd.program import Entry, Input, Program, State

from .contract import Note, Pass, Refusal
from .frame_wise import FrameWise, clip_size, with_sizes
from .match import calls
from .rewrite import declare

__all__ = ["StreamFrames"]

aten = torch.ops.aten

_VIEWS = (
    aten.expand, aten.flatten, aten.permute, aten.reshape, aten.slice, aten.squeeze, aten.transpose, aten.unflatten,
    aten.unsqueeze, aten.view,
)  # fmt: skip
_SHAPED = (aten.expand, aten.reshape, aten.unflatten, aten.view)  # by sizes that are arguments


class StreamFrames(Pass):
    """Compute of the newest frame alone what depends on one frame, and keep that of the frames before it as state.

        head(encode(clip))  ->  e = encode(frame); known = cat(kept, e); head(known), known[1:]

    An entry is meant whose inputs have one open size, the number of frames. After as many calls as the window has
    frames it gives what the clip of these frames gives; before that, what is kept of missing frames is zero.

    1. A value is frame-wise if it has one index a frame that depends on that frame alone (see frame_wise.py). It is
       computed of the newest frame.
    2. What is not frame-wise reads the window: what is kept of the value, then the newest. The sizes it reads are
       those of the window.
    3. A slice that leaves out the last frames, as a difference of neighbours reads it, is its source some frames ago,
       which is kept too.

    Refused: an entry whose inputs have no open size, or several; one in which an operator that is not frame-wise reads
    a whole input, for nothing would be gained; language models.

    Attributes:
        window: how many frames the stream looks back on, the newest included; 0: as many as the example had.
    """

    name = "stream-frames"
    window: int = 0

    def __post_init__(self) -> None:
        """Check that there is something to keep."""
        super().__post_init__()
        if self.window < 0 or self.window == 1:
            raise InputError(
                f"{self.name}: a window of {self.window} frames keeps nothing; give 2 or more, or 0 for the example's"
            )

    @property
    def lossless(self) -> bool:
        """It takes other inputs, so that there is nothing to compare at once."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Note]:
        """Find what is frame-wise, declare what is kept, then let the rest read windows."""
        graph = entry.graph
        if entry.of_language_model:
            yield Refusal(graph.output_node().name, "tokens have a cache: use insert-kv-cache")
            return
        opened = clip_size(program, entry)
        if isinstance(opened, str):
            yield Refusal(graph.output_node().name, opened)
            return
        analysis = FrameWise(program, entry, *opened)
        whole = next((n for n in analysis.found if _is_given(n) and _windows(n, analysis)), None)
        if whole is not None:
            reader = _windows(whole, analysis)[0]
            yield Refusal(
                reader.name, f"{analysis.why.get(reader, 'it')}, before anything is computed of each alone"
            )
            return
        window = self._window(entry, analysis, opened[1].shape_env)
        yield from _rewrite(program, entry, analysis, window)

    def _window(self, entry: Entry, analysis: FrameWise, sizes: Any) -> int:
        window = self.window or next(given.shape[d] for given in entry.inputs for d in given.dynamic)
        known = sizes.var_to_range[analysis.size]
        if not known.lower <= window <= known.upper:
            raise InputError(
                f"{self.name}: {entry.name} takes clips of {known.lower} to {known.upper} frames, so it cannot have a "
                f"window of {window}"
            )
        return window


def _windows(node: fx.Node, analysis: FrameWise) -> list[fx.Node]:
    """Return what reads all frames of a frame-wise value."""
    return [
        user
        for user in node.users
        if user not in analysis.found and not isinstance(analysis.values.get(user), torch.SymInt)
    ]


def _is_given(node: fx.Node) -> bool:
    """Say whether a value is an input, or one seen in another shape."""
    while calls(node, *_VIEWS):
        node = node.args[0]
    return node.op == "placeholder"


class _Read(NamedTuple):
    """`user` reads, in the place of `node`, some frames, the newest of them `late` before the newest of all."""

    user: fx.Node
    node: fx.Node
    frames: int
    late: int

    @property
    def past(self) -> int:
        """How far back it goes."""
        return self.frames - 1 + self.late


def _rewrite(program: Program, entry: Entry, analysis: FrameWise, window: int) -> Iterator[fx.Node | Note]:
    for node in entry.graph.nodes:
        _fix_sizes(node, analysis, window)
    reads = _reads(analysis, window)
    _take_one_frame(entry, analysis)
    kept: list[fx.Node] = []
    for source, of_source in reads.items():
        past, whole = max((read.past for read in of_source), default=0), source
        dim = analysis.found[source].dim
        if past:
            whole = _keep(program, entry, source, analysis.values[source], dim, past)
            kept.append(_sliced(whole, dim, 1, None))
            yield whole
            yield Note("", f"keeps {past} of {source.name} between calls, as {whole.args[0][0].name}")
        for read in of_source:
            end = past - read.late + 1
            newest = (read.frames, read.late) == (1, 0)
            part = source if newest else _sliced(whole, dim, end - read.frames, end if read.late else None)
            read.user.replace_input_with(read.node, part)
    _give(entry.graph, kept)


def _reads(analysis: FrameWise, window: int) -> dict[fx.Node, list[_Read]]:
    """Return what reads more than the newest frame, or an older one, of each frame-wise value that is no slice."""
    found: dict[fx.Node, list[_Read]] = {}
    for node, frames in analysis.found.items():
        source, late = node, 0
        while (left_out := analysis.found[source].late) is not None:
            late, source = late + left_out, source.args[0]
        reads = found.setdefault(source, [])
        reads += [_Read(user, node, window - frames.lost, late) for user in _windows(node, analysis)]
        if source is not node:
            one = (u for u in node.users if u in analysis.found and analysis.found[u].late is None)
            reads += [_Read(user, node, 1, late) for user in one]
    return found


def _fix_sizes(node: fx.Node, analysis: FrameWise, window: int) -> None:
    """Let a call read numbers in the place of sizes: one frame where a frame-wise value is shaped, else the window."""
    if node.op in {"call_function", "output"} and not isinstance(analysis.values.get(node), torch.SymInt):
        one = node in analysis.found and calls(node, *_SHAPED)
        node.args, node.kwargs = with_sizes(
            (node.args, node.kwargs),
            analysis.values,
            lambda size: 1 if one else int(size.subs(analysis.size, window)),
        )


def _take_one_frame(entry: Entry, analysis: FrameWise) -> None:
    taken = []
    for given, node in zip(entry.inputs, entry.graph.find_nodes(op="placeholder"), strict=True):
        shape = list(given.shape)
        if node in analysis.found:
            shape[analysis.found[node].dim] = 1
            node.meta.pop("val", None)  # which is that of the clip
        taken.append(Input(given.name, given.dtype, tuple(shape)))
    entry.inputs = tuple(taken)


def _keep(
    program: Program, entry: Entry, source: fx.Node, value: torch.Tensor, dim: int, past: int
) -> fx.Node:
    """Declare a state that holds so many frames of a value, and return those with the newest behind them."""
    shape = tuple(past if d == dim else int(size) for d, size in enumerate(value.shape))
    name = f"kept{len(program.states) + 1}"
    (state,) = declare(program, entry, State(name, str(value.dtype).removeprefix("torch."), shape))
    after = state if source.op == "placeholder" else source
    with entry.graph.inserting_after(after):
        return entry.graph.call_function(aten.cat.default, ([state, source], dim))


def _sliced(whole: fx.Node, dim: int, start: int, end: int | None) -> fx.Node:
    if start == 0 and end is None:
        return whole
    with whole.graph.inserting_after(whole):
        return whole.graph.call_function(aten.slice.Tensor, (whole, dim, start, end, 1))


def _give(graph: fx.Graph, states: list[fx.Node]) -> None:
    """Put the next values of states behind the outputs."""
    output = graph.output_node()
    own = output.args[0]
    output.args = ((*(own if isinstance(own, list | tuple) else (own,)), *states),)

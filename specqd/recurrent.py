"""One direction of one recurrent layer as an operator, so that time is a loop of compiled code and not of the graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["GATES", "recurrent"]

GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
"""Kind of cell -> how many numbers a time and channel it takes of the input."""


@torch.library.custom_op("specqd::recurrent", mutates_args=())
def recurrent(
    kind: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    cell: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return what a layer says at each time, `[T, B, H]`, and the state that it ends with, `[B, H]`.

    That is the cell of an `lstm`, and of the others the last of what they said. The equations are those of
    torch.nn.LSTM, GRU and RNN (Hochreiter and Schmidhuber, 1997; Cho et al., 2014).

    Args:
        kind: of GATES.
        x: the input times its matrix, with its bias, `[T, B, gates * H]`; gates in torch's order.
        weight: the transposed matrix of the hidden state, `[H, gates * H]`.
        bias: of that product, `[gates * H]`.
        hidden: at the begin, `[B, H]`.
        cell: of an `lstm` at the begin, `[B, H]`.
        reverse: whether time runs backwards.
    """
    said = []
    for at in x.flip(0) if reverse else x:
        from_hidden = F.linear(hidden, weight.T, bias)
        if kind == "lstm":
            assert cell is not None
            enter, forget, new, leave = (at + from_hidden).chunk(4, -1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh()
        elif kind == "gru":
            (reset, update, new), (r, u, n) = at.chunk(3, -1), from_hidden.chunk(3, -1)
            new = (new + (reset + r).sigmoid() * n).tanh()
            hidden = new + (update + u).sigmoid() * (hidden - new)
        else:
            hidden = getattr(torch, kind)(at + from_hidden)
        said.append(hidden)
    last = hidden if cell is None else cell
    return torch.stack(said[::-1] if reverse else said), last.clone()


@recurrent.register_fake
def _(kind, x, weight, bias, hidden, cell, reverse):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:2], weight.shape[0]), torch.empty_like(hidden)

"""Recurrent layers in `specqd::recurrent`: torch's own rules unroll time, and fix its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import _rnn_helper, gather_params, one_layer_lstm
from torch.nn import functional as F  # noqa: N812

import specqd.recurrent  # noqa: F401  (registers the operator)
from specqd.errors import CodegenError

__all__ = ["LAYERS", "lstm_layer"]

aten = torch.ops.aten


def _layer(
    kind: str, x: Tensor, state: Any, params: Sequence[Tensor], has_biases: bool, reverse: bool = False
) -> tuple[Tensor, Any]:
    """Compute one direction of one layer, `x [T, B, C]`, as _rnn_helper asks for it."""
    ih_weight, hh_weight = params[:2]
    ih_bias, hh_bias = params[2:4] if has_biases else (None, None)
    hidden, cell = state if kind == "lstm" else (state, None)
    inputs = F.linear(x, ih_weight, ih_bias)
    said, last = torch.ops.specqd.recurrent(kind, inputs, hh_weight.t(), hh_bias, hidden, cell, reverse)
    return said, (said[0 if reverse else -1], last) if kind == "lstm" else last


def _layers(
    kind: str, x: Tensor, hx: Any, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    """Compute all layers of float32; projections, other dtypes and widths that are open are left to torch."""
    projects = kind == "lstm" and hx[0].shape[2] != hx[1].shape[2]
    if x.dtype is not torch.float32 or projects or not isinstance(params[1].shape[1], int):
        return NotImplemented
    states = list(zip(*hx, strict=True)) if kind == "lstm" else hx.unbind(0)
    said, last = _rnn_helper(
        x, states, gather_params(params, has_biases, False), has_biases, num_layers, dropout, train, bidirectional,
        batch_first, partial(_layer, kind),
    )  # fmt: skip
    if kind != "lstm":
        return said, torch.stack(last)
    return said, *(torch.stack(part) for part in zip(*last, strict=True))


def lstm_layer(
    x: Tensor, ih_weight: Tensor, hh_weight: Tensor, ih_bias: Tensor, hh_bias: Tensor, hidden: Tensor, cell: Tensor,
    reverse: bool, batch_sizes: list[int], mode: int, hidden_size: int, num_layers: int, has_biases: bool,
    bidirectional: bool, batch_first: bool, train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator that torch makes of each layer and direction of an LSTM on a CPU, time first."""
    if batch_sizes:
        raise CodegenError("packed sequences are not compiled: pad them, and give the LSTM a tensor")
    rows = hidden.shape[-2:]  # torch calls it with and without a dimension of one layer in front
    state = hidden.reshape(rows), cell.reshape(rows)
    weights = [ih_weight, hh_weight, ih_bias, hh_bias]
    layer = partial(_layer, "lstm") if x.dtype is torch.float32 else one_layer_lstm
    found, (last, kept) = layer(x, state, weights, has_biases, reverse)
    return found, last.reshape(hidden.shape), kept.reshape(cell.shape), x.new_empty(0)


LAYERS: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: partial(_layers, "lstm"),
    aten.gru.input: partial(_layers, "gru"),
    aten.rnn_tanh.input: partial(_layers, "tanh"),
    aten.rnn_relu.input: partial(_layers, "relu"),
}
"""Operator of torch for layers of one kind -> the same in operators that are compiled."""

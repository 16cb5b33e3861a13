"""Recurrent layers, a step at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specqd.errors import CaptureError
from specqd.frontends.onnx.graph import Node
from specqd.frontends.onnx.rules import rule

__all__: list[str] = []

Activation = Callable[[Tensor], Tensor]
Step = Callable[..., tuple[Tensor, ...]]


def _activation(node: Node, name: str, alpha: float | None, beta: float | None) -> Activation:
    def given(value: float | None, usual: float) -> float:
        return usual if value is None else value

    known: dict[str, Activation] = {
        "relu": F.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softsign": F.softsign,
        "softplus": F.softplus,
        "affine": lambda x: given(alpha, 1.0) * x + given(beta, 0.0),
        "leakyrelu": lambda x: F.leaky_relu(x, given(alpha, 0.01)),
        "thresholdedrelu": lambda x: torch.where(x >= given(alpha, 1.0), x, 0.0),
        "scaledtanh": lambda x: given(alpha, 1.0) * torch.tanh(given(beta, 1.0) * x),
        "hardsigmoid": lambda x: torch.clamp(given(alpha, 0.2) * x + given(beta, 0.5), 0, 1),
        "elu": lambda x: F.elu(x, given(alpha, 1.0)),
    }
    if name.lower() not in known:
        raise CaptureError(f"{node}: there is no activation {name!r}")
    return known[name.lower()]


def _rnn(
    weights: dict[str, Tensor], act: list[Activation], clip: Activation, options: dict[str, Any]
) -> Step:
    def step(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (
            act[0](clip(F.linear(x, weights["w"], weights["bw"]) + F.linear(h, weights["r"], weights["br"]))),
        )

    return step


def _gru(
    weights: dict[str, Tensor], act: list[Activation], clip: Activation, options: dict[str, Any]
) -> Step:
    w, r, bw, br = (weights[key].chunk(3) for key in ("w", "r", "bw", "br"))

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        z, reset = (act[0](clip(F.linear(x, w[k], bw[k]) + F.linear(h, r[k], br[k]))) for k in (0, 1))
        if options["linear_before_reset"]:
            inner = F.linear(x, w[2], bw[2]) + reset * F.linear(h, r[2], br[2])
        else:
            inner = F.linear(x, w[2], bw[2]) + F.linear(reset * h, r[2], br[2])
        new = act[1](clip(inner))
        return ((1 - z) * new + z * h,)

    return step


def _lstm(
    weights: dict[str, Tensor], act: list[Activation], clip: Activation, options: dict[str, Any]
) -> Step:
    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        gates = F.linear(x, weights["w"], weights["bw"]) + F.linear(h, weights["r"], weights["br"])
        i, o, f, g = gates.chunk(4, -1)
        pi, po, pf = weights["p"].chunk(3)
        i = act[0](clip(i + pi * c))
        f = 1 - i if options["input_forget"] else act[0](clip(f + pf * c))
        cell = f * c + i * act[1](clip(g))
        return act[0](clip(o + po * cell)) * act[2](cell), cell

    return step


_KINDS: dict[str, tuple[int, tuple[str, ...], Callable[..., Step]]] = {
    "RNN": (1, ("Tanh",), _rnn),
    "GRU": (3, ("Sigmoid", "Tanh"), _gru),
    "LSTM": (4, ("Sigmoid", "Tanh", "Tanh"), _lstm),
}


@rule("RNN", "GRU", "LSTM")
def _recurrent(
    node: Node, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    h: Tensor | None = None, c: Tensor | None = None, p: Tensor | None = None, *,
    activations: list[str] | None = None, activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, input_forget: int = 0, layout: int = 0, linear_before_reset: int = 0,
) -> Any:  # fmt: skip
    """Run each direction over `x [time, batch, input]`; `layout` 1 has the batch first."""
    gates, usual, make = _KINDS[node.op]
    ways = 2 if direction == "bidirectional" else 1
    if layout:
        x, h, c = x.transpose(0, 1), *(None if v is None else v.transpose(0, 1) for v in (h, c))
    steps, batch, hidden = x.shape[0], x.shape[1], r.shape[2]
    if not isinstance(steps, int):
        raise CaptureError(f"{node}: the number of steps is left open; fix it with dynamic_shapes")
    names = activations or list(usual) * ways
    alphas, betas = list(activation_alpha or []), list(activation_beta or [])
    functions = [
        _activation(node, name, *(values[at] if at < len(values) else None for values in (alphas, betas)))
        for at, name in enumerate(names)
    ]

    def bounded(v: Tensor) -> Tensor:
        return v if not clip else v.clamp(-clip, clip)

    outputs, lasts = [], []
    for way in range(ways):
        zeros = torch.zeros(2 * gates * hidden, dtype=x.dtype)
        bias = zeros if b is None else b[way]
        weights = {"w": w[way], "r": r[way], "bw": bias[: gates * hidden], "br": bias[gates * hidden :]}
        weights["p"] = torch.zeros(3 * hidden, dtype=x.dtype) if p is None else p[way]
        options = {"input_forget": input_forget, "linear_before_reset": linear_before_reset}
        step = make(weights, functions[way * len(usual) :], bounded, options)
        empty = torch.zeros(batch, hidden, dtype=x.dtype)
        state = [empty if v is None else v[way] for v in ((h, c) if node.op == "LSTM" else (h,))]
        backward = direction == "reverse" or way == 1
        seen, state = _over(step, x, state, lengths, backward)
        outputs.append(torch.stack(seen))
        lasts.append(state)
    whole = torch.stack(outputs, 1)  # [time, ways, batch, hidden]
    ends = [torch.stack([state[k] for state in lasts]) for k in range(len(lasts[0]))]
    if layout:
        return whole.permute(2, 0, 1, 3), *(end.transpose(0, 1) for end in ends)
    return whole, *ends


def _over(
    step: Step, x: Tensor, state: list[Tensor], lengths: Tensor | None, backward: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Step over time; sequences that are shorter keep their state, and give zeros."""
    steps = x.shape[0]
    seen: list[Tensor] = [x] * steps
    for at in range(steps - 1, -1, -1) if backward else range(steps):
        new = list(step(x[at], *state))
        if lengths is None:
            state, seen[at] = new, new[0]
            continue
        inside = (lengths > at)[:, None]
        state = [torch.where(inside, after, before) for after, before in zip(new, state, strict=True)]
        seen[at] = torch.where(inside, new[0], 0.0)
    return seen, state

"""Recurrent layers in compiled modules, against torch's own."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.export import Dim

import specqd
import specqd.recurrent

KINDS = {
    "lstm": lambda: nn.LSTM(5, 20, bidirectional=True),
    "gru": lambda: nn.GRU(5, 33, num_layers=2),
    "gru without bias": lambda: nn.GRU(5, 3, bias=False),
    "tanh": lambda: nn.RNN(5, 17),
    "relu": lambda: nn.RNN(5, 40, nonlinearity="relu"),
}


class Layers(nn.Module):
    """A layer of each kind, of which it gives what is said and the last states, from states that are not zero."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(make() for make in KINDS.values())

    def forward(self, x):
        found = []
        for layer in self.layers:
            ways = layer.num_layers * (1 + layer.bidirectional)
            state = x.mean() * x.new_ones(ways, x.shape[1], layer.hidden_size)
            said, last = layer(x, (state, state / 2) if isinstance(layer, nn.LSTM) else state)
            found += [said, *(last if isinstance(last, tuple) else (last,))]
        return tuple(found)


@torch.no_grad()
def test_every_kind_for_any_batch(tmp_path, rng):
    torch.manual_seed(0)
    net, batch = Layers().eval(), Dim("batch", max=64)
    specqd.compile(
        net,
        tmp_path / "artifact",
        example_inputs=(torch.randn(3, 3, 5, generator=rng),),
        dynamic_shapes=({1: batch},),
    )
    run = specqd.load(tmp_path / "artifact")
    for rows in (1, 3, 4, 6, 9):
        x = torch.randn(3, rows, 5, generator=rng)
        for found, wanted in zip(run(x), net(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_time_is_a_loop_of_compiled_code(tmp_path, rng):
    torch.manual_seed(0)
    layer, x = nn.GRU(8, 24, batch_first=True).eval(), torch.randn(1, 150, 8, generator=rng)
    specqd.compile(layer, tmp_path / "artifact", example_inputs=(x,))
    run = specqd.load(tmp_path / "artifact")
    assert sum(call.function.startswith("recurrent") for call in run.record.kernels) == 1
    assert len(run.record.kernels) < 10
    for found, wanted in zip(run(x), layer(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_lstm_of_torch_compile(dtype, rng):
    torch._dynamo.reset()
    layer, x = nn.LSTM(5, 12).eval().to(dtype), torch.randn(3, 2, 5, generator=rng).to(dtype)
    compiled = torch.compile(layer, backend="specqd", options={"fallback": "error"})
    # Of BF16 each step rounds to 8 bits, and torch rounds elsewhere.
    rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (2**-6, 2**-7)
    torch.testing.assert_close(compiled(x), layer(x), rtol=rtol, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_operator_means_what_torch_does(kind, reverse, rng):
    torch.manual_seed(0)
    make = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, partial(nn.RNN, nonlinearity=kind))
    layer, x = make(5, 7), torch.randn(6, 3, 5, generator=rng)
    inputs = nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    zeros = torch.zeros(3, 7)
    said, last = torch.ops.specqd.recurrent(
        kind,
        inputs,
        layer.weight_hh_l0.T,
        layer.bias_hh_l0,
        zeros,
        zeros if kind == "lstm" else None,
        reverse,
    )
    wanted, state = layer(x.flip(0) if reverse else x)
    torch.testing.assert_close(said, wanted.flip(0) if reverse else wanted)
    torch.testing.assert_close(last, (state[1] if kind == "lstm" else state)[0])

"""Layers as matrices and rows: their product is the layer's output; what is no layer says why."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import specqd
from specqd.errors import InputError
from specqd.passes.contract import Refusal
from specqd.passes.prune.gram import grams
from specqd.passes.prune.layers import prunable
from specqd.reference import run

LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6)),
    "2d, uneven padding": (nn.Conv2d(4, 6, (4, 2), padding="same"), (2, 4, 7, 6)),
    "2d, one image": (nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 7, 6)),
    "3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
}


def only_layer(program):
    (layer,) = prunable(program, program.target)
    return layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", LAYERS)
def test_rows_times_matrix_is_the_output(case, rng):
    module, shape = LAYERS[case]
    x = torch.randn(shape, generator=rng)
    program = specqd.capture(module, (x,))
    layer = only_layer(program)
    weight = program.weights["weight"].detach()
    matrix = layer.matrix(weight)
    assert torch.equal(layer.restored(matrix, weight.dtype), weight)
    products = layer.rows(layer.nodes[0], x) @ matrix.mT  # [groups, samples * positions, rows]
    wanted = run(program, program.target, x)
    if not isinstance(module, nn.Linear):
        wanted = (wanted if wanted.dim() == x.dim() > 3 or case == "1d" else wanted[None]).movedim(1, -1)
    got = products.transpose(0, 1).reshape(-1, layer.shape[0]) + program.weights["bias"]
    assert_close(got, wanted.reshape(-1, layer.shape[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", LAYERS)
def test_a_gram_matrix_is_that_of_the_rows_and_ones(case, rng, monkeypatch):
    import specqd.passes.prune.gram as module_of_grams

    module, shape = LAYERS[case]
    batches = [(torch.randn(shape, generator=rng),) for _ in range(3)]
    program = specqd.capture(module, batches[0])
    layer = only_layer(program)
    rows = torch.cat([layer.rows(layer.nodes[0], x) for (x,) in batches], 1).double()
    rows = torch.cat([rows, torch.ones(*rows.shape[:2], 1)], 2)
    monkeypatch.setattr(module_of_grams, "_ROWS", 50)  # a few rows at a time
    (found,) = [item for item in grams(program, program.target, [layer], batches) if isinstance(item, tuple)]
    assert found[0] is layer
    # Sums of some hundred products in float32.
    assert_close(found[1], rows.mT @ rows, rtol=1e-5, atol=1e-4)


class Tied(nn.Module):
    """A weight that two linears read, one that an embedding reads too, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False)
        self.second.weight = self.first.weight
        self.embed = nn.Embedding(5, 8)
        self.embed.weight = self.head.weight
        self.up = nn.ConvTranspose1d(5, 5, 2)

    def forward(self, tokens):
        x = self.second(torch.relu(self.first(self.embed(tokens))))
        return self.up(self.head(torch.nn.functional.linear(x, self.first.weight.T.tanh())).mT)


def test_a_tied_weight_is_one_layer_and_what_is_none_says_why(rng):
    tokens = torch.randint(5, (1, 6), generator=rng)
    program = specqd.capture(Tied(), (tokens,))
    found = prunable(program, program.target)
    assert [r.why for r in found if isinstance(r, Refusal)] == [
        "numpy_t reads first.weight in another way",
        "numpy_t reads first.weight in another way",
        "its weight is computed, not stored",
        "embedding reads head.weight in another way",
        "transposed convolutions are not pruned",
    ]


def test_ignore_takes_patterns_and_refuses_one_without_a_match(rng):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    program = specqd.capture(module, (torch.randn(1, 4, generator=rng),))
    refusal, layer = prunable(program, program.target, ("0.*",))
    assert refusal == Refusal("linear", "0.weight is ignored") and layer.weight == "1.weight"
    with pytest.raises(InputError, match=r"ignore=2\.\* matches no weight .* such as 0.weight, 1.weight"):
        prunable(program, program.target, ("2.*",))


def test_the_gram_of_a_tied_weight_is_the_sum_over_its_products(rng):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    x, module = torch.randn(9, 4, generator=rng), Two()
    program = specqd.capture(module, (x,))
    layer = only_layer(program)
    assert len(layer.nodes) == 2 and layer.bias is None
    (found,) = [
        item[1] for item in grams(program, program.target, [layer], [(x,)]) if isinstance(item, tuple)
    ]
    rows = torch.cat([x, torch.relu(module.first(x))]).detach().double()
    assert_close(found[0, :-1, :-1], rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_layers_beyond_the_memory_wait_for_another_run(rng, monkeypatch):
    import specqd.passes.prune.gram as module_of_grams

    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(9, 4, generator=rng)
    program = specqd.capture(module, (x,))
    layers = prunable(program, program.target)
    at_once = [item[1] for item in grams(program, program.target, layers, [(x,)]) if isinstance(item, tuple)]
    monkeypatch.setattr(module_of_grams, "_MEMORY", 1)
    told = list(grams(program, program.target, layers, [(x,)]))
    one_by_one = [item[1] for item in told if isinstance(item, tuple)]
    assert len(told) == 6 and all(map(torch.equal, at_once, one_by_one))

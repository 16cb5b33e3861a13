"""fold-batch-norm against torch's own batch norm: operators, numbers, refusals, a second run."""

import re

import pytest
import torch
from small_programs import ops
from torch import nn
from torch.testing import assert_close

import specqd
from specqd.passes.fold_batch_norm import FoldBatchNorm
from specqd.reference import run


def trained(module: nn.Module, rng: torch.Generator) -> nn.Module:
    """Give batch norms statistics and scales far from the usual start."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean = torch.randn(part.num_features, generator=rng)
            part.running_var = torch.rand(part.num_features, generator=rng) + 0.1
            if part.affine:
                part.weight.data = torch.randn(part.num_features, generator=rng)
                part.bias.data = torch.randn(part.num_features, generator=rng)
    return module.eval()


FOLDED = {
    "after a convolution": (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "without bias": (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "without scale": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 4, 5, 5)),
    "grouped": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "depthwise": (
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.BatchNorm2d(4)),
        (2, 4, 5, 5),
    ),
    "one dimension": (nn.Sequential(nn.Conv1d(4, 6, 3, dilation=2), nn.BatchNorm1d(6)), (2, 4, 9)),
    "three dimensions": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 3, 4, 3)),
    "after a linear": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    "before a convolution": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), (2, 4, 5, 5)),
    "before a grouped one": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 5, 5)),
    "before a linear": (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), (3, 4)),
    "twice": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_a_batch_norm_becomes_part_of_the_product(case, rng):
    module, shape = FOLDED[case]
    module, x = trained(module, rng), torch.randn(shape, generator=rng)
    program = specqd.capture(module, (x,))
    result = FoldBatchNorm()(program)
    assert not result.refusals and result.rewrites == sum("batch_norm" in op for op in ops(program))
    assert ops(result.program) == [op for op in ops(program) if "batch_norm" not in op]
    # A few roundings of float32, of values up to some tens.
    assert_close(run(result.program, result.program.target, x), module(x), rtol=1e-5, atol=3e-5)
    assert FoldBatchNorm()(result.program).rewrites == 0


def test_weights_keep_their_names_and_the_program_stays(rng):
    module = trained(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), rng)
    before = module[0].weight.clone()
    program = specqd.capture(module, (torch.randn(1, 4, 5, 5, generator=rng),))
    after = FoldBatchNorm()(program).program
    after.drop_unused_weights()
    assert set(after.weights) == {"0.weight", "0.bias"}
    assert torch.equal(program.weights["0.weight"], before) and torch.equal(module[0].weight, before)


def test_a_weight_of_another_entry_stays(rng):
    module = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), rng)
    x = torch.randn(1, 4, 5, 5, generator=rng)
    program = specqd.capture(module, (x,))
    program.entries["other"] = program.target.copy()
    program.entries["other"].name = "other"
    after = FoldBatchNorm()(program).program
    assert torch.equal(run(after, after.entries["other"], x), module(x))
    assert_close(run(after, after.target, x), module(x), rtol=1e-5, atol=3e-5)


def test_the_dense_weight_of_a_pruned_one_is_folded_alike(rng):
    module = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), rng)
    x = torch.randn(1, 4, 5, 5, generator=rng)
    program = specqd.capture(module, (x,))
    program.dense["0.weight"] = program.weights["0.weight"]
    program.weights["0.weight"] = torch.zeros(6, 4, 3, 3)
    after = FoldBatchNorm()(program).program
    assert not after.weights["0.weight"].any()
    after.weights |= after.dense
    assert_close(run(after, after.target, x), module(x), rtol=1e-5, atol=3e-5)


class Twice(nn.Module):
    """Reads what is before the norm a second time, or the norm itself."""

    def __init__(self, again: str) -> None:
        super().__init__()
        self.again, self.conv, self.norm = again, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return {"product": z + y, "weight": z + self.conv(x), "norm": z}[self.again]


class Relu(nn.Module):
    def forward(self, x):
        return torch.relu(x)


@pytest.mark.parametrize(
    ("module", "shape", "why"),
    [
        (Twice("product"), (1, 4, 3, 3), "conv2d before it has other readers; after it, add is no .*"),
        (Twice("weight"), (1, 4, 3, 3), "before it, conv_weight of conv2d is computed, or others read it; .*"),
        (nn.Sequential(Relu(), nn.BatchNorm2d(4), Relu()), (1, 4, 3, 3),
         "before it, relu is no convolution or linear; after it, relu_1 is no convolution or linear"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), (1, 4, 3, 3),
         "before it, input_1 is no .*; conv2d after it pads with zeros that would need the shift"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding="same")), (1, 4, 3, 3), ".* pads with zeros .*"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (2, 4, 3, 3),
         "it normalises by the batch's own statistics, for training left none"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(True), nn.BatchNorm2d(4, track_running_stats=False)), (2, 4, 3, 3),
         "it normalises by the batch's own statistics, for training left none"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), (2, 3, 4),
         "linear before it has its channels last; after it, output is no .*"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)), (2, 4, 3, 3),
         "before it, conv_transpose2d is no convolution or linear; after it, output is no .*"),
    ],
)  # fmt: skip
def test_refusals_say_why(module, shape, why, rng):
    x = torch.randn(shape, generator=rng)
    program = specqd.capture(trained(module, rng), (x,))
    result = FoldBatchNorm()(program)
    assert result.rewrites == 0
    (refusal,) = result.refusals
    assert refusal.node.startswith("batch_norm")
    assert re.fullmatch(why, refusal.why), refusal.why

import pytest
import torch
from compiled import RUNNABLE, Compiled
from small_programs import DIM, Decoder, of, ops
from torch import fx, nn
from torch.testing import assert_close

from specqd.errors import InputError
from specqd.passes.quantize import mxfp4
from specqd.passes.quantize.cast_mxfp4 import CastMXFP4
from specqd.passes.quantize.refine_head import RefineHead
from specqd.program import Entry, ModelInfo, Program

CHANNELS = 203  # 12 groups of 16 and one of 11


def decoder(channels: int = CHANNELS, dim: int = DIM) -> Program:
    model = Decoder(lambda m, x, _: torch.relu(x))
    model.embed, model.lm_head = nn.Embedding(13, dim), nn.Linear(dim, channels)
    return of(model.bfloat16().float())


def test_the_head_before_and_after():
    program = decoder()
    result = RefineHead(best=2)(program)
    assert ops(result.program) == ["aten.embedding", "aten.relu", "specqd.linear_refined"]
    assert result.refusals == ()
    assert result.program.weights["lm_head.weight.mxfp4_blocks"].shape == (CHANNELS, DIM // 2)


@pytest.mark.parametrize(("channels", "best"), [(CHANNELS, 1), (CHANNELS, 3), (192, 2), (17, 1)])
def test_the_largest_groups_are_exact_and_the_others_are_the_preview(channels: int, best: int, rng):
    x = torch.randn(1, 5, DIM, generator=rng)
    weight, bias = torch.randn(channels, DIM, generator=rng), torch.randn(channels, generator=rng)
    cast = mxfp4.encode(weight, "search")
    got = torch.ops.specqd.linear_refined(x, *cast, bias, weight, best)[0]
    preview, exact = x[0] @ mxfp4.decode(*cast).T + bias, x[0] @ weight.T + bias
    for row in range(5):
        groups = [range(i, min(i + 16, channels)) for i in range(0, channels, 16)]
        order = sorted(groups, key=lambda group: -max(preview[row, group]))
        again = {channel for group in order[:best] for channel in group}
        expected = [(exact if c in again else preview)[row, c] for c in range(channels)]
        assert_close(got[row], torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_code_computes_the_same_groups_again(isa: str, dtype: torch.dtype, rng):
    """A head whose preview is exact but for a few groups: what is computed again differs by far from the preview."""
    table = torch.randint(-3, 4, (33, DIM), generator=rng).float()
    weight = torch.randint(-1, 2, (CHANNELS, DIM), generator=rng).to(dtype)
    preview = weight.float() * 0.5
    graph = fx.Graph()
    tokens, _ = graph.placeholder("tokens"), graph.placeholder("positions")
    blocks, scales = mxfp4.encode(preview, "floor")
    weights = {"table": table, "blocks": blocks, "scales": scales, "weight": weight}
    rows = graph.call_function(torch.ops.aten.embedding.default, (graph.get_attr("table"), tokens))
    codes, exponents, exact_weight = (graph.get_attr(name) for name in ("blocks", "scales", "weight"))
    arguments = (rows, codes, exponents, None, exact_weight, 3)
    graph.output(graph.call_function(torch.ops.specqd.linear_refined.default, arguments))
    program = Program({"target": Entry("target", graph)}, weights, ModelInfo("toy", 33, 64))
    compiled = Compiled(program, isa)
    x = table[[3, 9, 27, 5]]
    quantised = torch.stack([_rounded(row) for row in x])
    with_preview = torch.ops.specqd.linear_refined(quantised[None], blocks, scales, None, preview, 3)[0]
    exact = x @ weight.float().T
    got = torch.from_numpy(compiled.feed("target", [3, 9, 27, 5], 0))
    again = (got - exact).abs() < 1e-4
    close = (got - with_preview).abs() < 1e-2
    assert (again | close).all()
    groups = torch.nn.functional.pad(again, (0, 5), value=True).unflatten(1, (13, 16)).all(2)
    maxima = torch.nn.functional.pad(with_preview, (0, 5), value=-1e9).unflatten(1, (13, 16)).amax(2)
    for row in range(4):
        third = maxima[row].sort(descending=True).values[2]
        assert groups[row][maxima[row] > third + 0.05].all()
        assert groups[row].sum() >= 3
        assert not groups[row][maxima[row] < third - 0.05].any()


def _rounded(row: torch.Tensor) -> torch.Tensor:
    """INT8 in blocks of 32, as the kernels round activations."""
    blocks = row.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize(
    ("program", "options", "why"),
    [
        (decoder(), {}, "of its 203 channels 1024 would be computed again, which saves too little"),
        (decoder(dim=40), {"best": 1}, "its input has 40 channels, not a multiple of 32"),
        (CastMXFP4()(decoder()).program, {"best": 1}, "cast already: specqd.linear_int8.default"),
    ],
)
def test_what_is_refused(program: Program, options: dict[str, int], why: str):
    result = RefineHead(**options)(program)
    assert [r.why for r in result.refusals] == [why]
    assert ops(result.program) == ops(program)


def test_a_second_time_changes_nothing_and_the_cast_leaves_it_alone():
    once = RefineHead(best=2)(decoder()).program
    assert ops(RefineHead(best=2)(once).program) == ops(once)
    assert ops(CastMXFP4()(once).program) == ops(once)


def test_a_number_that_is_none():
    with pytest.raises(InputError, match="cannot compute 0 groups again"):
        RefineHead(best=0)

"""stream-frames: graphs before and after, every window against the clip, refusals, what is kept from call to call."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import small_modules
import small_programs
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional
from torch.testing import assert_close

import specqd
from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.frame_wise import FrameWise, clip_size
from specqd.passes.prune.calibration_data import Data
from specqd.passes.quantize.quantize_int8 import QuantizeINT8
from specqd.passes.stream_frames import StreamFrames
from specqd.program import Program
from specqd.reference import new_caches, run
from specqd.saving import save_exported

FRAMES = 5
TOLERANCE = {
    "rtol": 1e-5,
    "atol": 5e-6,
}  # products of one row may add up in another order than those of several
IMAGES = (1, FRAMES, 3, 6, 6)
VECTORS = (1, FRAMES, 4)


def captured(
    function: Callable[..., Any], shape: tuple[int, ...], rng: torch.Generator, m: Any = None
) -> Program:
    """Capture `function(m, clip)` of a clip whose second dimension is that of the frames."""
    dim = Dim("frames", min=4, max=2 * FRAMES)
    weights = {} if m is None else vars(m)
    return small_modules.of(function, torch.randn(shape, generator=rng), dynamic=({1: dim},), **weights)


@pytest.fixture
def m(rng) -> SimpleNamespace:
    """The weights of the functions below: a kernel, and positions."""
    return SimpleNamespace(
        w=torch.randn(4, 3, 3, 3, generator=rng), p=torch.randn(2 * FRAMES, 4, generator=rng)
    )


def encoded(m: Any, clip: Tensor) -> Tensor:
    """Frames `[1, T, 3, 6, 6]` become embeddings `[1, T, 4]`."""
    maps = functional.max_pool2d(functional.conv2d(clip.flatten(0, 1), m.w).relu(), 2)
    return maps.mean((2, 3)).unflatten(0, clip.shape[:2])


def attending(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*[x[:, None]] * 3).sum((1, 2))


def positioned(m: Any, clip: Tensor) -> Tensor:
    return attending(encoded(m, clip) + m.p[: clip.shape[1]])


def differing(m: Any, clip: Tensor) -> Tensor:
    return positioned(m, clip[:, 1:] - clip[:, :-1])


def two_streams(m: Any, clip: Tensor) -> Tensor:
    return positioned(m, clip) + differing(m, clip)


def twice_differing(m: Any, clip: Tensor) -> Tensor:
    x = encoded(m, clip)
    x = x[:, 1:] - x[:, :-1]
    return attending(x[:, 1:] - x[:, :-1])


def far_back(m: Any, clip: Tensor) -> Tensor:
    x = encoded(m, clip)
    return attending(x[:, 2:] * x[:, :-2]) + x[:, :-1].amax(1) + x[:, 1:].amin(1)


def several(m: Any, clip: Tensor) -> tuple[Tensor, Tensor]:
    x = encoded(m, clip)
    return x.cumsum(1), x.transpose(1, 2)


STREAMED = {f.__name__: f for f in (positioned, differing, two_streams, twice_differing, far_back, several)}


def assert_streams(
    wanted: Callable[[Tensor], Any], call: Callable[[Tensor], Any], rng: torch.Generator
) -> None:
    frames = torch.randn(1, 9, *IMAGES[2:], generator=rng)
    for at in range(9):
        found = call(frames[:, at : at + 1])
        if at >= FRAMES - 1:
            assert_close(found, wanted(frames[:, at - FRAMES + 1 : at + 1]), **TOLERANCE)


@pytest.mark.parametrize("case", STREAMED)
def test_a_stream_gives_what_the_clip_of_its_last_frames_gives(case, m, rng):
    function = STREAMED[case]
    result = StreamFrames()(captured(function, IMAGES, rng, m))
    assert not result.refusals and result.rewrites == len(result.program.states)
    kept, program = new_caches(result.program), result.program
    call = partial(run, program, program.target, caches=kept)
    assert_streams(partial(function, m), call, rng)


def test_the_graph_before_and_after(m, rng):
    program = captured(positioned, IMAGES, rng, m)
    embedding = ["flatten", "conv2d", "relu", "max_pool2d", "mean", "unflatten"]
    deciding = ["slice", "add", "unsqueeze", "scaled_dot_product_attention", "sum"]
    assert small_modules.calls(program) == [*embedding, *deciding]
    result = StreamFrames()(program)
    assert small_modules.calls(result.program) == [*embedding, "cat", "slice", *deciding]
    assert [str(given) for given in result.program.target.inputs] == ["given_0 float32 [1, 1, 3, 6, 6]"]
    assert [str(state) for state in result.program.states.values()] == ["kept1 float32 [1, 4, 4]"]
    assert [note.what for note in result.notes] == ["keeps 4 of unflatten between calls, as kept1"]
    assert "state kept1 float32 [1, 4, 4]" in str(result.program)
    assert program.states == {} and small_modules.calls(program) == [*embedding, *deciding]


def test_a_second_run_rewrites_nothing(m, rng):
    once = StreamFrames()(captured(positioned, IMAGES, rng, m)).program
    again = StreamFrames()(once)
    assert again.rewrites == 0 and again.program.states == once.states
    assert [r.why for r in again.refusals] == [
        "no size of its inputs is open: capture it with dynamic_shapes that open the dimension of the frames"
    ]


def test_another_window_than_that_of_the_example(m, rng):
    program = StreamFrames(window=4)(captured(positioned, IMAGES, rng, m)).program
    kept, frames = new_caches(program), torch.randn(1, 6, *IMAGES[2:], generator=rng)
    found = [run(program, program.target, frames[:, at : at + 1], caches=kept) for at in range(6)]
    assert_close(found[5], positioned(m, frames[:, 2:]), **TOLERANCE)


@pytest.mark.parametrize("window", [11, 2])
def test_a_window_that_the_model_cannot_have(window, m, rng):
    program = captured(positioned, IMAGES, rng, m)
    with pytest.raises(
        InputError, match=rf"takes clips of 4 to 10 frames, so it cannot have a window of {window}"
    ):
        StreamFrames(window=window)(program)
    with pytest.raises(InputError, match="a window of 1 frames keeps nothing"):
        StreamFrames(window=1)


REFUSED = {
    "frames convolved together": (
        lambda _, clip: functional.conv1d(clip.transpose(1, 2), torch.ones(4, 4, 2)).sum(2), VECTORS,
        "conv1d.default mixes frames",
    ),
    "the mean of the frames": (lambda _, clip: clip.mean(1), VECTORS, "mean.dim mixes frames"),
    "clips side by side": (
        lambda _, clip: clip.flatten(0, 1).relu().unflatten(0, clip.shape[:2]).sum(1), (2, FRAMES, 4),
        "flatten.using_ints gives no dimension with one index a frame",
    ),
    "frames behind channels": (
        lambda _, clip: clip.flatten(1).unflatten(1, (4, clip.shape[1])).sum(1), VECTORS,
        "flatten.using_ints gives no dimension with one index a frame",
    ),
    "an operator that nobody knows": (
        lambda _, clip: torch.fft.fft(clip).abs().sum(1), VECTORS, "of fft_fft.default it is not known whether",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_frames_that_meet_before_anything_is_computed_of_each(case, rng):
    function, shape, why = REFUSED[case]
    result = StreamFrames()(captured(function, shape, rng))
    assert result.rewrites == 0 and not result.program.states
    (refusal,) = result.refusals
    assert why in refusal.why and refusal.why.endswith("before anything is computed of each alone")


def test_a_language_model_has_a_cache_instead():
    (refusal,) = StreamFrames()(small_programs.of(small_programs.Decoder(lambda _, x, positions: x))).refusals
    assert refusal.why == "tokens have a cache: use insert-kv-cache"


def test_sizes_that_are_open_beside_the_frames(rng):
    clips = torch.randn(2, *VECTORS[1:], generator=rng)
    both = ({0: Dim("batch"), 1: Dim("frames")},)
    (refusal,) = StreamFrames()(
        small_modules.of(lambda _, clip: clip.exp().sum(1), clips, dynamic=both)
    ).refusals
    assert refusal.why.startswith("more than the number of frames (s")
    (refusal,) = StreamFrames()(small_modules.of(lambda _, clip: clip.exp(), clips)).refusals
    assert refusal.why.startswith("no size of its inputs is open")


#: functions of a clip [1, T, 4, 6], and whether what they give is frame-wise
FUNCTIONS = {
    "elementwise": (lambda _, x: x.sin() * x, True),
    "another order of dimensions": (lambda _, x: x.permute(2, 0, 3, 1).exp(), True),
    "a linear": (lambda _, x: functional.linear(x, torch.arange(12.0).reshape(2, 6)), True),
    "a softmax of channels": (lambda _, x: x.softmax(-1), True),
    "a softmax of frames": (lambda _, x: x.softmax(1), False),
    "a norm of channels": (lambda _, x: functional.layer_norm(x, (4, 6)), True),
    "a norm of groups": (lambda _, x: functional.group_norm(x.squeeze(0), 2), True),
    "a norm of groups over frames": (lambda _, x: functional.group_norm(x.transpose(1, 2).squeeze(0)[None], 2), False),
    "a norm of the batch": (
        lambda _, x: functional.batch_norm(x.squeeze(0), torch.ones(4), torch.ones(4)), True,
    ),
    "a norm by the batch": (lambda _, x: functional.batch_norm(x.squeeze(0), None, None, training=True), False),
    "attention in a frame": (lambda _, x: functional.scaled_dot_product_attention(x, x, x), True),
    "attention over frames": (
        lambda _, x: functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3), False,
    ),
    "a pool in a frame": (lambda _, x: functional.avg_pool1d(x.squeeze(0), 2), True),
    "a pool over frames": (
        lambda _, x: functional.max_pool2d(x.transpose(1, 2), 3, stride=1, padding=1), False,
    ),
    "a sum before": (lambda _, x: x + x.cumsum(1), False),
    "backwards": (lambda _, x: x.flip(1), False),
    "shifted": (lambda _, x: functional.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)), False),
    "counted": (lambda _, x: x + torch.arange(x.shape[1])[None, :, None, None], False),
    "rolled": (lambda _, x: x.roll(1, 1), False),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONS)
def test_frame_wise_is_what_each_frame_decides_alone(case, rng):
    """The oracle is the function itself: of a frame alone, and of clips that differ in the other frames."""
    function, expected = FUNCTIONS[case]
    clip = torch.randn(1, FRAMES, 4, 6, generator=rng)
    program = small_modules.of(function, clip, dynamic=({1: Dim("frames", min=3)},))
    opened = clip_size(program, program.target)
    assert not isinstance(opened, str)
    analysis = FrameWise(program, program.target, *opened)
    last = program.target.graph.output_node().args[0]
    assert (last in analysis.found) == expected, analysis.why
    if expected:
        frames, whole = analysis.found[last], function(None, clip)
        for at in range(FRAMES):
            alone = function(None, clip[:, at : at + 1])
            assert_close(alone, whole.narrow(frames.dim, at, 1), **TOLERANCE)


def test_compiled_code_keeps_its_state_until_it_is_reset(m, rng, tmp_path):
    program = Pipeline.parse("stream-frames")(captured(two_streams, IMAGES, rng, m))
    specqd.compile(program, tmp_path / "artifact", pipeline="")
    module = specqd.load(tmp_path / "artifact")
    frames = torch.randn(1, 2, *IMAGES[2:], generator=rng)
    first = [module(frames[:, at : at + 1]) for at in range(2)]
    assert_streams(partial(two_streams, m), module, rng)
    module.reset()
    assert all(torch.equal(module(frames[:, at : at + 1]), first[at]) for at in range(2))
    other = specqd.load(tmp_path / "artifact")  # a stream of its own
    assert torch.equal(other(frames[:, :1]), first[0])
    kept = new_caches(program)
    wanted = [run(program, program.target, frames[:, at : at + 1], caches=kept) for at in range(2)]
    for found, want in zip(first, wanted, strict=True):  # what is missing counts as zeros, in both
        assert_close(found, want, **TOLERANCE)
    assert "keeping kept1 float32 [1, 1, 3, 6, 6]" in repr(module)


def test_a_quantised_clip_streams_the_same(m, rng):
    clips = torch.randn(8, *IMAGES[1:], generator=rng)
    clip = QuantizeINT8(data=Data.of(clips))(captured(positioned, IMAGES, rng, m)).program
    program = StreamFrames()(clip).program
    assert any("quantize" in op for op in small_modules.calls(program)) and list(program.states)
    kept = new_caches(program)
    for at in range(FRAMES):
        found = run(program, program.target, clips[:1, at : at + 1], caches=kept)
    assert_close(found, run(clip, clip.target, clips[:1]), **TOLERANCE)


def test_in_onnx_a_state_goes_in_and_its_next_value_out(m, rng, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    program = StreamFrames()(captured(positioned, IMAGES, rng, m)).program
    specqd.export_onnx(program, tmp_path / "stream.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "stream.onnx")
    kept = torch.zeros(1, FRAMES - 1, 4).numpy()

    def call(frame: Tensor) -> Tensor:
        nonlocal kept
        found, kept = session.run(None, {"given_0": frame.numpy(), "kept1": kept})
        return torch.from_numpy(found)

    assert_streams(partial(positioned, m), call, rng)


def test_what_a_stream_cannot_be_used_for(m, rng, tmp_path):
    program = StreamFrames()(captured(positioned, IMAGES, rng, m)).program
    with pytest.raises(InputError, match="reads the state kept1, which samples do not have: calibrate first"):
        QuantizeINT8(data=Data.of(torch.randn(4, 1, 3, 6, 6)))(program)
    with pytest.raises(InputError, match="has a cache or a state, kept1"):
        save_exported(program, tmp_path / "stream.pt2")

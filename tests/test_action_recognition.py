"""The example of action recognition: its model against definitions written out again, its data, its demo end to end."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import specqd
from examples.action_recognition import __main__ as command
from examples.action_recognition import video
from examples.action_recognition.baselines import FrameMean, Recurrent
from examples.action_recognition.compiled import compile_stream
from examples.action_recognition.data import CLASSES, FRAMES, SIZE, Clips, normalised
from examples.action_recognition.distillation import distillation_loss
from examples.action_recognition.encoders import ENCODERS, FrameEncoder
from examples.action_recognition.model import ClipModel, Transformer, TwoStream, sinusoids
from examples.action_recognition.recognition import Recognition, predictions
from examples.action_recognition.train import accuracies, train
from examples.action_recognition.variants import make, trained
from specqd.errors import InputError


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_head_has_as_many_parameters_as_the_published_code():
    head = Transformer(400)
    assert count(head.blocks[0]) == 3 * 512 * 512 + (2 * 512 * 1024 + 1024 + 512) + 2 * 2 * 512 == 1_838_592
    assert count(head) == 4 * 1_838_592 + 512 * 400 + 400 + 16 * 512 == 7_567_760
    assert head(torch.zeros(2, 16, 512)).shape == (2, 400)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032 + 2048 * 512 + 512),
        ("mobilenetv2_100", 2_223_872 + 1280 * 512 + 512),
        ("seresnext101_32x4d", 46_906_416 + 2048 * 512 + 512),
    ],
)
def test_encoders_of_timm(name, parameters):
    pytest.importorskip(
        "timm", reason="needs timm, which needs a torchvision that fits this torch", exc_type=Exception
    )
    encoder = FrameEncoder(name).eval()
    assert count(encoder) == parameters
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


def test_the_small_encoder():
    encoder = FrameEncoder("narrow", 128).eval()
    with torch.no_grad():
        assert encoder(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 128)
        assert ENCODERS["narrow"]()[0](torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 192, 2, 2)
    assert 1.5e6 < count(encoder) < 1.7e6


def test_positions_are_sines_and_cosines_and_the_first_stays_zero(rng):
    table = sinusoids(16, 512)
    for p in range(16):
        for j in (0, 1, 2, 255, 510, 511):
            angle = p / 10000 ** (2 * (j // 2) / 512)
            wanted = 0.0 if p == 0 else (math.cos if j % 2 else math.sin)(angle)
            assert table[p, j] == pytest.approx(wanted, abs=1e-5)
    head = Transformer(3, 4, dim=16, heads=2, blocks=1)
    head(torch.randn(2, 4, 16, generator=rng)).square().sum().backward()
    assert head.positions.grad[0].abs().max() == 0 < head.positions.grad[1:].abs().min()


def test_a_block_is_attention_head_by_head_then_norms_behind_residuals(rng):
    block = Transformer(3, 4, dim=16, heads=2, blocks=1).eval().blocks[0]
    x = torch.randn(5, 16, generator=rng, dtype=torch.float64).numpy()
    w = {name: p.detach().double().numpy() for name, p in block.named_parameters()}

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        deviation = np.sqrt(((x - x.mean(1, keepdims=True)) ** 2).sum(1, keepdims=True) / 15)
        return (x - x.mean(1, keepdims=True)) / (deviation + 1e-3) * w[f"{name}.weight"] + w[f"{name}.bias"]

    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        q, k, v = (x @ w[f"{part}.weight"][h].T for part in "qkv")
        scores = np.exp(q @ k.T / math.sqrt(16))  # the model's width, not the head's
        heads.append(scores / scores.sum(1, keepdims=True) @ v)
    mixed = norm("attention_norm", np.concatenate(heads, 1) + x)
    inner = np.maximum(mixed @ w["feed_forward.0.weight"].T + w["feed_forward.0.bias"], 0)
    wanted = norm("norm", inner @ w["feed_forward.2.weight"].T + w["feed_forward.2.bias"] + mixed)
    with torch.no_grad():
        found = block.double()(torch.from_numpy(x)[None])[0]
    assert_close(found, torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)


def test_the_order_of_frames_is_seen_through_positions_alone(rng):
    x, order = torch.randn(2, 6, 32, generator=rng), torch.tensor([3, 0, 5, 1, 4, 2])
    head = Transformer(5, 6, dim=32, heads=4, blocks=2).eval()
    blind = Transformer(5, 6, dim=32, heads=4, blocks=2, positions=False).eval()
    with torch.no_grad():
        assert_close(blind(x[:, order]), blind(x), rtol=1e-5, atol=1e-6)
        assert (head(x[:, order]) - head(x)).abs().max() > 1e-3
        before = head(x)
        head.positions.data = head.positions[order]
        assert_close(head(x[:, order]), before, rtol=1e-5, atol=1e-6)
        mean, last = FrameMean(5, dim=32), Recurrent(5, dim=32)
        assert_close(mean(x[:, order]), mean(x), rtol=1e-5, atol=1e-6)
        assert (last(x[:, order]) - last(x)).abs().max() > 1e-3


def test_streams(rng):
    clip = torch.randn(2, 4, 3, SIZE, SIZE, generator=rng)
    rgb, motion = (
        ClipModel(
            FrameEncoder("narrow", 16), Transformer(3, 4, dim=16, heads=2, blocks=1), difference=difference
        ).eval()
        for difference in (False, True)
    )
    with torch.no_grad():
        both = TwoStream(rgb, motion)(clip)
        differences = torch.stack([clip[:, t] - clip[:, t - 1] for t in (1, 2, 3)], 1)
        motion.difference = False
        assert_close(both, (rgb(clip) + motion(differences)) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [torch.tensor([0, 4, 2]), torch.tensor([0, 4])])
def test_distillation(rng, labels):
    student, teacher = (torch.randn(3, 5, generator=rng) * 4 for _ in range(2))

    def softmax(logits: Tensor, temperature: float) -> np.ndarray:
        powers = np.exp(logits.double().numpy() / temperature)
        return powers / powers.sum(1, keepdims=True)

    hard = -np.log(softmax(student, 1)[np.arange(len(labels)), labels.numpy()]).mean()
    p, q = softmax(teacher, 8), softmax(student, 8)
    soft = (p * np.log(p / q)).sum(1).mean()
    assert float(distillation_loss(student, teacher, labels)) == pytest.approx(
        hard + 0.4 * 64 * soft, rel=1e-5
    )
    assert float(distillation_loss(student, student, labels)) == pytest.approx(hard, rel=1e-5)


REVERSED = (("left", "right"), ("up", "down"), ("clockwise", "counterclockwise"), ("growing", "shrinking"))


@pytest.mark.parametrize("pair", REVERSED, ids=" and ".join)
def test_a_motion_backwards_is_the_reverse_motion(pair):
    """So no single frame tells them apart."""
    forth, back = (Clips("train", 3).batch(torch.tensor([CLASSES.index(name)] * 4)).float() for name in pair)
    # The mean of 16 pixels has noise with a deviation of 1, of two clips 1.4.
    forth, back = (
        functional.avg_pool2d(clips.flatten(0, 1), 4).unflatten(0, (4, FRAMES)) for clips in (forth, back)
    )
    assert (forth - back.flip(1)).abs().max() < 10 < (forth - back).abs().amax((1, 2, 3, 4)).min()


def test_the_order_of_two_events_is_not_in_their_frames():
    one, other = (
        Clips("test", 3).batch(torch.tensor([CLASSES.index(name)])).float()[0]
        for name in ("vanishes, then inverts", "inverts, then vanishes")
    )
    one, other = (clip[clip.mean((1, 2, 3)).argsort()] for clip in (one, other))
    assert (one.mean((1, 2, 3)) - other.mean((1, 2, 3))).abs().max() < 0.5


def test_test_clips_have_objects_and_textures_of_their_own():
    train, test = (Clips(split, 0) for split in ("train", "test"))
    alike = (train.outlines[:, None] - test.outlines[None]).abs().amax(2)
    assert alike.min() > 0.05
    for clips in (train, test):
        assert clips.textures.min() >= 0 and clips.textures.max() <= 1 and clips.outlines.max() < 1.001
    assert torch.equal(Clips("test", 5).batch(torch.arange(3)), Clips("test", 5).batch(torch.arange(3)))


def test_training_lowers_the_loss_on_what_it_sees():
    labels = torch.arange(4)
    clips = Clips("train", 0).batch(labels)
    model = train(make("frame mean"), (clips, labels), 8, 0)
    assert not model.training and accuracies(model, (clips, labels))["all"] >= 50


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("action") / "artifact"
    compile_stream(trained("VTN of differences"), "fp32", torch.zeros(1, FRAMES, 3, SIZE, SIZE), folder)
    return folder


def test_the_compiled_stream_says_what_the_clip_says_and_is_mostly_right(artifact):
    labels = torch.arange(22) % len(CLASSES)
    clips = Clips("test", 7).batch(labels)
    with torch.no_grad():
        wanted = trained("VTN of differences")(normalised(clips))
    found = list(predictions(artifact, clips))
    assert found == wanted.argmax(-1).tolist()
    moved = [at for at, label in enumerate(labels.tolist()) if "clockwise" not in CLASSES[label]]
    assert sum(found[at] == labels[at] for at in moved) >= 0.9 * len(moved)
    stream = specqd.load(artifact)
    for frame in normalised(clips[0]):
        logits = stream(frame[None, None])
    assert_close(logits[0], wanted[0], rtol=1e-4, atol=1e-4)


def test_the_demo_annotates_a_video(artifact, tmp_path, monkeypatch, capsys):
    pytest.importorskip("av", reason="videos need PyAV")
    source, target = tmp_path / "moving.mp4", tmp_path / "annotated.mp4"
    clip = Clips("test", 9).batch(torch.tensor([CLASSES.index("right")]))[0]
    with video.writing(source, 10) as write:
        for frame in clip:
            write(np.kron(frame.permute(1, 2, 0).numpy(), np.ones((3, 3, 1), np.uint8)))
    words = ["demo", str(source), "--artifact", str(artifact), "-o", str(target), "--stride", "1"]
    monkeypatch.setattr(sys, "argv", ["action_recognition", *words])
    command.main()
    found = re.search("16 frames, the last is (.*), [0-9]+ %; [0-9]+ frames/s", capsys.readouterr().out)
    assert found and found[1] in CLASSES  # which one, in frames that a codec changed, is another matter
    with video.read(str(target)) as (rate, frames):
        last = list(frames)[-1]
    assert rate == 10 and last.shape == (192, 192, 3)


@pytest.mark.parametrize("size", [(361, 641), (48, 640)])
def test_a_video_is_as_large_as_its_frames(tmp_path, size):
    """640 is what the codec would take unasked."""
    pytest.importorskip("av", reason="videos need PyAV")
    with video.writing(tmp_path / "out.mp4", 10) as write:
        write(np.zeros((*size, 3), np.uint8))
    with video.read(str(tmp_path / "out.mp4")) as (_, frames):
        assert [frame.shape for frame in frames] == [(size[0] & ~1, size[1] & ~1, 3)]


def test_what_is_said_stands_in_a_corner():
    grey = np.full((192, 240, 3), 128, np.uint8)
    found = video.annotated(grey, ["left, 99 %", "85 frames/s"])
    assert (found[:2] == 128).all() and (found[100:] == 128).all() and (found[:, 200:] == 128).all()
    box = found[6:20, 6:40].reshape(-1)
    assert {0, 255} <= set(box.tolist()) and (box == 128).mean() == 0


def test_a_label_waits_for_enough_frames(artifact):
    recognition = Recognition(artifact, stride=2)
    found = [recognition.feed(np.zeros((80, 100, 3), np.uint8)).label for _ in range(2 * FRAMES)]
    assert found[: 2 * FRAMES - 2] == [None] * (2 * FRAMES - 2) and found[-1] in CLASSES


def test_what_is_no_video(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av", reason="videos need PyAV")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for source, why in (
        (str(text), "cannot be read as a video"),
        (str(tmp_path / "none.mp4"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=why), video.read(source):
            pass
    monkeypatch.setattr(sys, "argv", ["action_recognition", "demo", str(text)])
    with pytest.raises(SystemExit, match=r"error: .*cannot be read as a video"):
        command.main()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="pip install av"), video.read(str(text)):
        pass


def test_damage_and_emptiness_are_said_and_no_unfinished_file_stays(tmp_path):
    av = pytest.importorskip("av", reason="videos need PyAV")

    def damaged():
        yield av.VideoFrame(16, 16, "rgb24")
        raise av.error.InvalidDataError(1, "Invalid data found")

    for frames, why in (
        (damaged(), "clip is damaged after 1 frames: Invalid data"),
        (iter(()), "of no frames"),
    ):
        with pytest.raises(InputError, match=why):
            list(video._decoded("clip", frames))
    pixels = np.zeros((32, 32, 3), np.uint8)
    nowhere, target = tmp_path / "a" / "b.mp4", tmp_path / "out.mp4"
    with pytest.raises(InputError, match="cannot be written as a video"), video.writing(nowhere, 10) as write:
        write(pixels)

    def interrupted():
        with video.writing(target, 10) as write:
            write(pixels)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not target.exists()

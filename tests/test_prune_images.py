"""Calibration data: fractals, folders of images, tensors and texts, and what cannot be used of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_programs import DIM, Decoder, of
from torch import nn
from torch.export import Dim

import specqd
import specqd.passes.prune.calibration_data as module
from specqd.cli import main
from specqd.errors import InputError
from specqd.passes import Pipeline
from specqd.passes.prune.calibration_data import Data, Samples
from specqd.passes.prune.fractals import fractals, variants
from specqd.passes.prune.image_folder import image_files, read_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path / "cache"))


def captured(channels=3, size=(20, 28), dynamic=True):
    module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    shapes = ({0: Dim("batch", max=64)},) if dynamic else None
    return specqd.capture(module, (torch.zeros(4, channels, *size),), shapes)


def batches(program, data, **options):
    return list(Data(data).batches(program, program.target, Samples(**{"count": 8} | options)))


# Fractals


def test_a_seed_gives_the_same_images_and_another_one_others():
    one, two, other = (np.stack(list(fractals(6, (40, 56), seed))) for seed in (0, 0, 1))
    assert one.shape == (6, 40, 56, 3) and one.dtype == np.uint8
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_images_use_their_whole_range_and_differ():
    images = list(fractals(27, (48, 48), 3))
    assert all(image.min() == 0 and image.max() == 255 and image.std() > 20 for image in images)
    assert len({image.tobytes() for image in images}) == 27


def test_there_are_25_variants_that_change_one_number():
    found = variants()
    assert found.shape == (25, 6) and len(np.unique(found, axis=0)) == 25
    assert ((found != 1).sum(1) == [0, *[1] * 24]).all()


def test_the_command_writes_them(tmp_path, capsys):
    folder = tmp_path / "fractals"
    arguments = ["synthesize-images", "-n", "3", "-o", str(folder), "--size", "32", "--seed", "4"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code and "made 3 images of 32 x 32 pixels" in capsys.readouterr().out
    got = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    assert all(map(np.array_equal, got, fractals(3, (32, 32), 4)))
    with pytest.raises(SystemExit) as end:
        main(arguments)  # the folder is taken
    assert end.value.code == 2


@pytest.mark.parametrize("wrong", [["-n", "0"], ["--size", "15"], ["--seed", "-1"]])
def test_wrong_options_end_in_one_sentence(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as end:
        main(["synthesize-images", "-o", str(tmp_path / "x"), *wrong])
    assert end.value.code == 2 and "error: give 1 image or more" in capsys.readouterr().err


def test_they_are_drawn_once_if_they_are_few(monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "fractals", lambda *given: drawn.append(given) or fractals(*given))
    made = Data("fractals").batches(program := captured(), program.target, Samples(8, seed=9))
    first, second = (torch.cat([x for (x,) in made]) for _ in range(2))
    assert torch.equal(first, second) and drawn == [(8, (20, 28), 9)]
    monkeypatch.setattr(module, "_KEPT", 8 * 20 * 28 * 3 - 1)
    assert torch.equal(torch.cat([x for (x,) in made]), first) and len(drawn) == 2


# Batches


def test_images_become_what_the_model_takes():
    pixels = np.stack(list(fractals(8, (20, 28), 0)))
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    assert torch.equal(torch.cat([x for (x,) in batches(captured(), "fractals", pixels="unit")]), wanted)
    signed = torch.cat([x for (x,) in batches(captured(), "fractals", pixels="signed")])
    assert torch.equal(signed, wanted * 2 - 1)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    imagenet = torch.cat([x for (x,) in batches(captured(), "fractals")])
    assert torch.equal(imagenet, (wanted - mean) / deviation)
    (grey,) = batches(captured(channels=1), "fractals", pixels="unit")
    assert torch.equal(grey[0], wanted.mean(1, keepdim=True))


def test_batches_have_the_size_that_was_captured_and_can_be_asked_for_again():
    fixed = captured(dynamic=False)
    data = Data("random").batches(fixed, fixed.target, Samples(11))
    assert [x.shape[0] for (x,) in data] == [4, 4] and len(data) == 2
    assert all(torch.equal(a, b) for (a,), (b,) in zip(data, data, strict=True))
    assert [x.shape[0] for (x,) in batches(captured(), "random", count=40)] == [16, 16]


def test_a_folder_gives_some_of_its_images_by_the_seed(tmp_path):
    for number in range(6):
        Image.new("RGB", (60, 30 + number), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "deep").mkdir()
    Image.new("L", (30, 90), 7).save(tmp_path / "deep" / "6.jpg", quality=100)
    (tmp_path / "notes.txt").write_text("no image")
    assert len(image_files(tmp_path, 99, 0)) == 7
    one, two = (image_files(tmp_path, 4, seed) for seed in (0, 1))
    assert len(one) == 4 and one == image_files(tmp_path, 4, 0) and one != two
    (x,) = batches(captured(), str(tmp_path), pixels="unit", count=7)[0]
    assert x.shape == (7, 3, 20, 28)
    assert sorted(x[:, 0, 0, 0].mul(255).round().tolist()) == [0, 1, 2, 3, 4, 5, 7]


def test_a_whole_pipeline_runs_without_data():
    text = "fold-batch-norm, sparsify{sparsity=0.5,method=wanda,samples=8}, calibrate{samples=8}"
    after = Pipeline.parse(text)(captured())
    assert all(event.rewritten for event in after.history[1:])


def test_a_language_model_takes_tokens(tmp_path):
    program = of(Decoder(lambda m, x, _: m.up(x), up=nn.Linear(DIM, DIM)))
    given = batches(program, "random", count=3)
    assert [tokens.shape for tokens, _ in given] == [(1, 64)] * 3
    after = Pipeline.parse("sparsify{sparsity=0.5,method=sparsegpt,data=random,samples=3}")(program)
    assert after.history[-1].rewritten
    with pytest.raises(
        InputError, match=r"data=fractals is for images, and target takes tokens; give data=FILE"
    ):
        batches(program, "fractals")
    with pytest.raises(InputError, match=r"the model came without tokenizer.json"):
        batches(program, str(tmp_path / "text.txt"))


# What cannot be used


def broken(folder, kind):
    folder.mkdir()
    if kind == "deep":
        Image.fromarray(np.zeros((4, 4), dtype=np.int32)).save(folder / "a.tif")
    elif kind == "cut":
        (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("empty", r"holds no images; put some there, as \.bmp"),
        ("deep", r"a.tif has more than 8 bits a channel \(I\); convert it to 8"),
        ("cut", r"cannot read the image .*a.png"),
    ],
)
def test_a_folder_that_cannot_be_used_is_an_error(tmp_path, kind, why):
    folder = broken(tmp_path / "images", kind)
    with pytest.raises(InputError, match=why):
        list(read_images(image_files(folder, 3, 0), (8, 8)))


def test_a_place_that_is_no_folder_is_an_error():
    with pytest.raises(InputError, match=r"nowhere are no folder; give fractals, random or a folder"):
        batches(captured(), "nowhere")


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ((), "give a tensor for each input of the module, with the same number of samples"),
        ((torch.zeros(0, 3),), "one or more"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), "with the same number of samples"),
        ((torch.full((2, 3), torch.nan),), "hold NaN or infinity; leave those samples out"),
    ],
)
def test_tensors_that_are_no_samples_are_errors(tensors, why):
    with pytest.raises(InputError, match=why):
        Data.of(*tensors)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(4, 3, 20, 20), r"takes input float32 \[\?, 3, 20, 28\], not float32 \[4, 3, 20, 20\]"),
        (torch.zeros(4, 1, 20, 28), r"not float32 \[4, 1, 20, 28\]"),
        (torch.zeros(4, 3, 20, 28).byte(), r"not uint8 \[4, 3, 20, 28\]"),
    ],
)
def test_tensors_that_do_not_fit_are_errors(tensor, why):
    program = captured()
    with pytest.raises(InputError, match=why):
        Data.of(tensor).batches(program, program.target, Samples(4))


def test_a_model_that_takes_no_image_needs_tensors():
    program = specqd.capture(nn.Linear(4, 4), (torch.zeros(2, 4),))
    with pytest.raises(
        InputError, match=r"data=fractals gives images, and target takes input float32 \[2, 4\]"
    ):
        batches(program, "fractals")
    tokens = specqd.capture(nn.Embedding(4, 4), (torch.tensor([1]),))
    with pytest.raises(
        InputError, match=r"data=random gives normal values, and target takes input int64 \[1\]"
    ):
        batches(tokens, "random")


def test_too_few_samples_are_an_error():
    with pytest.raises(InputError, match="0 samples are too few"):
        batches(captured(), "random", count=0)
    with pytest.raises(InputError, match=r"3 samples are fewer than the batch of 4 .* dynamic_shapes"):
        batches(captured(dynamic=False), "random", count=3)

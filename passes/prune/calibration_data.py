"""What layers are calibrated on: generated images, images of a folder, a text, or tensors; batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from specqd.digest import digest
from specqd.errors import InputError
from specqd.passes.quantize.calibration_text import encode_file, known_to, piece
from specqd.program import Entry, Input, Program
from specqd.reference import demand_fitting, inputs, new_caches

from .fractals import fractals
from .image_folder import image_files, read_images

__all__ = ["Data", "Pixels", "Samples"]

Pixels = Literal["imagenet", "unit", "signed"]
"""What a pixel of 0 to 255 becomes: less ImageNet's mean, by its deviation; 0 to 1; or -1 to 1."""

_BATCH = 16
_KEPT = 1 << 27  # bytes of fractals that are kept: 891 images of 224 x 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LEAST_TOKENS = 128


@dataclass(frozen=True)
class Samples:
    """How many images or texts to take, what chooses them, and what pixels become."""

    count: int
    seed: int = 0
    pixels: Pixels = "imagenet"


@dataclass(frozen=True)
class _Stream(Collection[tuple[Any, ...]]):
    """Batches that are made anew each time they are asked for."""

    size: int
    make: Callable[[], Iterator[tuple[Any, ...]]]
    device: torch.device | str = "cpu"

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (tuple(value.to(self.device) for value in batch) for batch in self.make())

    def __len__(self) -> int:
        return self.size

    def __contains__(self, item: object) -> bool:
        return any(item is batch for batch in self)


@dataclass(frozen=True)
class Data:
    """Calibration data by the name of their source; as an option of a pass, its text.

    Attributes:
        source: `fractals` (generated images), `random` (normal values, or tokens), a folder of images, or a file of
            UTF-8 text for a language model.
        tensors: one for each input of a module, with a sample at each index of the first dimension; see `of`.
    """

    choices: ClassVar[str] = "fractals | random | a folder of images | a text file"

    source: str = "fractals"
    tensors: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Data:
        """Read the text of an option."""
        return cls(text)

    @classmethod
    def of(cls, *tensors: Tensor) -> Data:
        """Return tensors as data, one for each input of a module; raises InputError if they have no samples."""
        if not tensors or not all(
            isinstance(t, Tensor) and t.dim() and len(t) == len(tensors[0]) > 0 for t in tensors
        ):
            raise InputError(
                "give a tensor for each input of the module, with the same number of samples, one or more"
            )
        if any(not t.isfinite().all() for t in tensors):
            raise InputError("the calibration tensors hold NaN or infinity; leave those samples out")
        made_of = hashlib.sha256("".join(map(digest, tensors)).encode())
        return cls(f"tensors:{made_of.hexdigest()[:16]}", tensors)

    def __str__(self) -> str:
        """Give the text of the option."""
        return self.source

    def fingerprint(self, samples: Samples) -> str:
        """Name what the batches depend on, beside the entry and `samples`."""
        path = Path(self.source).expanduser()
        files = (
            image_files(path, samples.count, samples.seed)
            if path.is_dir()
            else [path]
            if path.is_file()
            else []
        )
        return self.source + "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)

    def batches(self, program: Program, entry: Entry, samples: Samples) -> Collection[tuple[Any, ...]]:
        """Return values of the entry's placeholders, as many at a time as its first dimension takes, or 16.

        They are on the device of the program's weights.

        Raises:
            InputError: the source cannot be read, has fewer samples than one batch, or does not suit the entry.
        """
        stream = self._stream(program, entry, samples)
        device = next((weight.device for weight in program.weights.values()), stream.device)
        return dataclasses.replace(stream, device=device)

    def _stream(self, program: Program, entry: Entry, samples: Samples) -> _Stream:
        if samples.count < 1:
            raise InputError(f"{samples.count} samples are too few to calibrate on; give 1 or more")
        if entry.of_language_model:
            return self._texts(program, entry, samples)
        if program.states:
            raise InputError(
                f"{entry.name} reads the state {next(iter(program.states))}, which samples do not have: calibrate "
                "first, then `stream-frames`"
            )
        if self.tensors:
            return self._given(entry)
        if self.source == "random":
            return _random(entry, samples)
        if len(entry.inputs) != 1 or not _takes_images(entry.inputs[0]):
            raise InputError(
                f"data={self.source} gives images, and {entry.name} takes {', '.join(map(str, entry.inputs))}; "
                "give tensors, as Data.of(...) in Python, or data=random"
            )
        return self._images(entry.inputs[0], samples)

    def _given(self, entry: Entry) -> _Stream:
        size = _batch(entry.inputs[0], len(self.tensors[0]))
        batches = list(zip(*(t.split(size) for t in self.tensors), strict=True))[
            : len(self.tensors[0]) // size
        ]
        demand_fitting(entry, batches[0])
        return _Stream(len(batches), lambda: iter(batches))

    def _images(self, wanted: Input, samples: Samples) -> _Stream:
        _, channels, *size = wanted.shape
        if self.source == "fractals":
            count, images = samples.count, lambda: _fractals(samples.count, (size[0], size[1]), samples.seed)
        else:
            files = image_files(Path(self.source).expanduser(), samples.count, samples.seed)
            count, images = len(files), lambda: read_images(files, (size[0], size[1]))
        batch, dtype = _batch(wanted, count), getattr(torch, wanted.dtype)

        def made() -> Iterator[tuple[Any, ...]]:
            source = images()
            for _ in range(count // batch):
                pixels = np.stack([next(source) for _ in range(batch)])
                yield (_as_input(pixels, channels, samples.pixels).to(dtype),)

        return _Stream(count // batch, made)

    def _texts(self, program: Program, entry: Entry, samples: Samples) -> _Stream:
        if self.source == "random":
            generator = torch.Generator().manual_seed(samples.seed)
            shape = samples.count, piece(program.model)
            texts = torch.randint(
                entry.vocab_size or program.model.vocab_size, shape, generator=generator
            ).tolist()
        elif self.source == "fractals" or self.tensors:
            raise InputError(
                f"data={self} is for images, and {entry.name} takes tokens; give data=FILE, a UTF-8 text"
            )
        else:
            ids, size = encode_file(self.source, program.model), piece(program.model)
            if len(ids) < _LEAST_TOKENS:
                raise InputError(
                    f"the text {self.source} holds {len(ids)} tokens, too few to calibrate on; give "
                    f"{_LEAST_TOKENS} or more"
                )
            texts = known_to(entry, [ids[at : at + size] for at in range(0, len(ids), size)][: samples.count])

        def made() -> Iterator[tuple[Any, ...]]:
            small = program.copy()
            for text in texts:
                small.caches = {
                    name: dataclasses.replace(c, capacity=len(text)) for name, c in program.caches.items()
                }
                positions = torch.arange(len(text))[None]
                yield tuple(inputs(entry, torch.tensor([text]), positions, new_caches(small)))

        return _Stream(len(texts), made)


def _fractals(count: int, size: tuple[int, int], seed: int) -> Iterator[np.ndarray]:
    """Make fractals, or take those that were made last: a network looks at them in less time than they take to draw."""
    if count * size[0] * size[1] * 3 > _KEPT:
        return fractals(count, size, seed)
    return iter(_kept_fractals(count, size, seed))


@functools.lru_cache(maxsize=1)
def _kept_fractals(count: int, size: tuple[int, int], seed: int) -> tuple[np.ndarray, ...]:
    return tuple(fractals(count, size, seed))


def _takes_images(wanted: Input) -> bool:
    floating = getattr(torch, wanted.dtype).is_floating_point
    return floating and len(wanted.shape) == 4 and wanted.shape[1] in (1, 3)


def _batch(wanted: Input, count: int) -> int:
    size = min(_BATCH, count) if 0 in wanted.dynamic else wanted.shape[0]
    if count < size:
        raise InputError(
            f"{count} samples are fewer than the batch of {size} that the model was captured with; give more, or "
            "capture it with dynamic_shapes"
        )
    return size


def _as_input(pixels: np.ndarray, channels: int, how: Pixels) -> Tensor:
    """Turn uint8 [B, H, W, 3] into float32 [B, channels, H, W]."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if how == "signed":
        values = values * 2 - 1
    elif how == "imagenet":
        values = (values - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_DEVIATION).view(3, 1, 1)
    return values if channels == 3 else values.mean(1, keepdim=True)


def _random(entry: Entry, samples: Samples) -> _Stream:
    whole = next((i for i in entry.inputs if not getattr(torch, i.dtype).is_floating_point), None)
    if whole is not None:
        raise InputError(f"data=random gives normal values, and {entry.name} takes {whole}; give tensors")
    size = _batch(entry.inputs[0], samples.count)

    def made() -> Iterator[tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(samples.seed)
        for _ in range(samples.count // size):
            yield tuple(
                torch.randn(size if 0 in i.dynamic else i.shape[0], *i.shape[1:], generator=generator).to(
                    getattr(torch, i.dtype)
                )
                for i in entry.inputs
            )

    return _Stream(samples.count // size, made)

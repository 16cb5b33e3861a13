"""A compiled stream at work: which class the last frames show, and how fast frames are recognised."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import specqd

from .data import CLASSES, FRAMES, SIZE, normalised
from .video import square

__all__ = ["Recognised", "Recognition", "predictions"]


class Recognised(NamedTuple):
    """What the last frames show; `label` is None until there are enough. `seconds` is what the last one took."""

    label: str | None
    probability: float
    seconds: float


class Recognition:
    """A compiled stream that is fed frames of a video, of which it looks at every `stride`-th."""

    def __init__(self, artifact: Path, threads: int | None = None, stride: int = 2) -> None:
        """Load an artifact; raises ArtifactError as `specqd.load` does."""
        self.module, self.stride = specqd.load(artifact, threads), stride
        self.fed = 0
        self.last = Recognised(None, 0.0, 0.0)

    def feed(self, pixels: np.ndarray) -> Recognised:
        """Take a frame uint8 `[H, W, 3]` of any size."""
        at, self.fed = self.fed, self.fed + 1
        if at % self.stride == 0:
            began = time.perf_counter()
            frame = torch.from_numpy(square(pixels, SIZE).copy()).permute(2, 0, 1)[None, None]
            likely = self.module(normalised(frame)).softmax(-1)[0]
            label, seconds = CLASSES[int(likely.argmax())], time.perf_counter() - began
            enough = at // self.stride + 1 >= FRAMES
            self.last = Recognised(label if enough else None, float(likely.max()), seconds)
        return self.last


def predictions(artifact: Path, clips: Tensor, threads: int | None = None) -> Iterator[int]:
    """Yield the class at the end of each clip uint8 `[N, T, 3, H, W]`, fed frame by frame."""
    module = specqd.load(artifact, threads)
    for clip in clips:
        module.reset()
        for frame in normalised(clip):
            logits = module(frame[None, None])
        yield int(logits.argmax())

"""From a model of clips to a compiled stream: capture with an open number of frames, passes, artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

import specqd
from specqd.passes import Pass, Pipeline
from specqd.passes.prune.calibrate import Calibrate
from specqd.passes.prune.calibration_data import Data
from specqd.passes.prune.sparsify import Sparsify
from specqd.passes.quantize.cast_bf16 import CastBF16
from specqd.passes.quantize.quantize_int8 import QuantizeINT8
from specqd.passes.stream_frames import StreamFrames
from specqd.program import Program

from .data import CLASSES, Clips, normalised

__all__ = ["PRECISIONS", "capture", "compile_stream", "examples_of_training", "stream"]

_LEAST = 3  # frames of which a difference has two


def capture(model: nn.Module, clip: Tensor) -> Program:
    """Return the Program of a model of clips like `clip`, float32 `[1, T, 3, H, W]`, whose number of frames is open."""
    dim = Dim("frames", min=_LEAST, max=clip.shape[1])
    return Pipeline.parse("fold-batch-norm")(specqd.capture(model.eval(), (clip,), ({1: dim},)))


def _int8(data: Data) -> list[Pass]:
    return [QuantizeINT8(data=data)]


def _sparse(data: Data) -> list[Pass]:
    return [Sparsify(sparsity=0.65), Calibrate(data=data), *_int8(data)]


PRECISIONS: dict[str, Callable[[Data], list[Pass]]] = {
    "fp32": lambda data: [],
    "bf16": lambda data: [CastBF16()],
    "int8": _int8,
    "int8-sparse": _sparse,
}
"""The passes of each precision, some of which are calibrated on clips."""


def stream(program: Program, precision: str, clips: Tensor) -> Program:
    """Return the program of one frame at a time, in a precision.

    Args:
        program: as `capture` gives it.
        precision: one of PRECISIONS.
        clips: float32 `[N, T, 3, H, W]`, to calibrate on.
    """
    for each in (*PRECISIONS[precision](Data.of(clips)), StreamFrames()):
        program = each(program).program
    return program


def compile_stream(model: nn.Module, precision: str, clips: Tensor, folder: Path) -> None:
    """Compile a model into an artifact that takes frames float32 `[1, 1, 3, H, W]`; it replaces one that is there."""
    specqd.compile(stream(capture(model, clips[:1]), precision, clips), folder, pipeline="", force=True)


def examples_of_training(count: int = 64) -> Tensor:
    """Return clips float32 `[count, 16, 3, 64, 64]` as the small models were trained on."""
    return normalised(Clips("train", 0).batch(torch.arange(count) % len(CLASSES)))

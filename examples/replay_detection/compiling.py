"""Compile a module of audio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

import specqd
from specqd.passes import Pipeline

__all__ = ["compile_audio"]

#: samples of the longest recording, 4 minutes; what comes after the first seconds is not looked at
LONGEST = 1 << 22


def compile_audio(
    module: nn.Module,
    folder: Path,
    *,
    least: int = 1,
    passes: Pipeline = Pipeline(),  # noqa: B008
) -> Callable[..., Any]:
    """Compile a module of audio `[time]` of any length from `least` samples on, rewritten by passes; load the artifact.

    Passes see audio `[1, time]`, a batch of one, as their calibration data have batches.
    """
    example = (torch.zeros(1, max(60_000, least)),)
    dynamic = ({1: Dim("samples", min=least, max=LONGEST)},)
    program = specqd.capture(_OfBatch(module).eval(), example, dynamic)
    specqd.compile(passes(program), folder, force=True)
    run = specqd.load(folder)
    return lambda x: run(x[None])


class _OfBatch(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x[0])

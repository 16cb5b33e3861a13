"""The models that are compared, all with the same small encoder, and where their trained weights lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .baselines import FrameMean, Recurrent
from .data import CLASSES, FRAMES
from .encoders import FrameEncoder
from .model import ClipModel, Transformer, TwoStream

__all__ = ["DIM", "VARIANTS", "make", "save", "trained"]

DIM = 128
_WEIGHTS = Path(__file__).parent / "weights"


def _model(head: nn.Module, *, difference: bool = False) -> nn.Module:
    return ClipModel(FrameEncoder("narrow", DIM), head, difference=difference)


def _transformer(*, positions: bool = True, difference: bool = False) -> nn.Module:
    head = Transformer(len(CLASSES), FRAMES, dim=DIM, positions=positions)
    return _model(head, difference=difference)


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "frame mean": lambda: _model(FrameMean(len(CLASSES), dim=DIM)),
    "LSTM": lambda: _model(Recurrent(len(CLASSES), dim=DIM)),
    "VTN without positions": lambda: _transformer(positions=False),
    "VTN": _transformer,
    "VTN of differences": lambda: _transformer(difference=True),
    "two streams": lambda: TwoStream(_transformer(), _transformer(difference=True)),
    "VTN, distilled": _transformer,
}
"""What makes each with random weights; two streams are a VTN and one of differences, trained apart."""


def make(variant: str, seed: int = 0) -> nn.Module:
    """Return a variant with random weights."""
    torch.manual_seed(seed)
    return VARIANTS[variant]()


def save(model: nn.Module, variant: str, folder: Path) -> None:
    """Write the weights in BF16, counts of batches aside."""
    floating = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    save_file(
        {name: value.bfloat16().contiguous() for name, value in floating.items()}, folder / _file(variant)
    )


def trained(variant: str) -> nn.Module:
    """Return a variant in float32, in evaluation mode, with the weights that are kept beside this file.

    Two streams have those of their parts. Raises FileNotFoundError for a variant whose weights are not kept.
    """
    if variant == "two streams":
        return TwoStream(trained("VTN"), trained("VTN of differences")).eval()
    model = make(variant)
    model.load_state_dict(
        {name: value.float() for name, value in load_file(_WEIGHTS / _file(variant)).items()}, strict=False
    )
    return model.eval()


def _file(variant: str) -> str:
    return f"{variant.replace(', ', '-').replace(' ', '-').lower()}.safetensors"

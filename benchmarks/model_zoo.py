"""The models of `models.py`, with random weights: torchvision, timm, transformers and our own; those of `replay.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from coverage_models import mend_torchvision
from torch import Tensor, nn

__all__ = ["AUDIO", "MODELS", "SECONDS", "build"]


class UNet(nn.Module):
    """Two levels down and up with convolutions of 3 x 3 (Ronneberger et al., arXiv 1505.04597), with batch norms."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [_double(3, width), _double(width, 2 * width), _double(2 * width, 4 * width)]
        )
        self.up = nn.ModuleList([_double(6 * width, 2 * width), _double(3 * width, width)])
        self.end = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level in self.down[:-1]:
            kept.append(level(x))
            x = nn.functional.max_pool2d(kept[-1], 2)
        x = self.down[-1](x)
        for level, beside in zip(self.up, reversed(kept), strict=True):
            x = level(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), beside], 1))
        return self.end(x)


def _double(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class ConvStack(nn.Module):
    """The feature encoder of wav2vec 2.0 (Baevski et al., arXiv 2006.11477, section 4.2) at a quarter of its width."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for at, (kernel, stride) in enumerate([(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]):
            layers.append(nn.Conv1d(width if at else 1, width, kernel, stride))
            layers += [nn.GroupNorm(width, width)] * (at == 0) + [nn.GELU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        mend_torchvision()
        import torchvision

        return getattr(torchvision.models, name)()

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        mend_torchvision()
        import timm

        return timm.create_model(name)

    return make


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mend_torchvision()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(), add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).last_hidden_state


class _Replay(nn.Module):
    """A system of examples/replay_detection with its weights: audio `[1, 1, time]` to scores."""

    def __init__(self, name: str) -> None:
        super().__init__()
        root = str(Path(__file__).parents[1])
        if root not in sys.path:
            sys.path.append(root)
        from examples.replay_detection import systems
        from examples.replay_detection.detector import Detector

        trained = systems.load()
        nets = {"LCNN": trained.lcnn, "LCNN and GRU": trained.lcnn_gru}
        self.system = Detector(trained.fourier, nets[name]) if name in nets else trained

    def forward(self, x: Tensor) -> Tensor:
        found = self.system(x[0, 0])
        return found[0] if isinstance(found, tuple) else found


_IMAGE = (3, 224, 224)
#: of audio at 16 kHz, as much as the systems look at
SECONDS = 53_598 / 16_000
AUDIO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    name: (partial(_Replay, name), (1, 53_598)) for name in ("LCNN", "LCNN and GRU", "all systems")
}
"""The systems of `replay.py`, likewise."""
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (_torchvision("resnet18"), _IMAGE),
    "ResNet-34": (_torchvision("resnet34"), _IMAGE),
    "ResNet-50": (_torchvision("resnet50"), _IMAGE),
    "MobileNetV3": (_torchvision("mobilenet_v3_large"), _IMAGE),
    "EfficientNet-Lite0": (_timm("efficientnet_lite0"), _IMAGE),
    "ViT-S/16": (_timm("vit_small_patch16_224"), _IMAGE),
    "BERT-base": (_Encoder, (128,)),
    "UNet": (UNet, (3, 128, 128)),
    "wav2vec2 convolutions": (ConvStack, (1, 16000)),
}
"""How a model is made, and the shape of one sample; a shape of one dimension is that of tokens."""


def build(name: str, batch: int = 1) -> tuple[nn.Module, Tensor]:
    """Return a model with the same random weights each time, and a batch of random inputs."""
    torch.manual_seed(0)
    make, shape = (MODELS | AUDIO)[name]
    module: Any = make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    if len(shape) == 1:
        return module, torch.randint(0, 30_000, (batch, *shape), generator=generator)
    return module, torch.randn(batch, *shape, generator=generator)

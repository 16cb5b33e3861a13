"""What makes a vector of a frame: an image model without its classifier, then a projection and a mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

__all__ = ["ENCODERS", "FrameEncoder"]


class FrameEncoder(nn.Module):
    """Frames float32 `[N, 3, H, W]` become embeddings `[N, dim]`.

    A convolution of 1 x 1 brings the last feature map to `dim` channels unless it has them; the mean over its places
    is the embedding.
    """

    def __init__(self, name: str, dim: int = 512) -> None:
        """Make the encoder `name`, one of ENCODERS, with random weights."""
        super().__init__()
        self.features, channels = ENCODERS[name]()
        self.project = nn.Identity() if channels == dim else nn.Conv2d(channels, dim, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Embed each frame by itself."""
        return self.project(self.features(frames)).mean((2, 3))


def _timm(name: str) -> tuple[nn.Module, int]:
    import timm

    model = timm.create_model(name, num_classes=0, global_pool="")
    return model, model.num_features


class _NarrowResNet(nn.Module):
    """ResNet-18 at three eighths of its width (He et al., arXiv 1512.03385), as transformers defines it."""

    widths = (24, 48, 96, 192)

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        config = ResNetConfig(
            embedding_size=self.widths[0], hidden_sizes=list(self.widths), depths=[2] * 4, layer_type="basic"
        )
        whole = ResNetModel(config)
        self.embedder, self.encoder = whole.embedder, whole.encoder

    def forward(self, frames: Tensor) -> Tensor:
        return self.encoder(self.embedder(frames)).last_hidden_state


def _narrow() -> tuple[nn.Module, int]:
    return _NarrowResNet(), _NarrowResNet.widths[-1]


_OF_TIMM = ("resnet34", "resnet50", "mobilenetv2_100", "seresnext101_32x4d")

ENCODERS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    **{name: partial(_timm, name) for name in _OF_TIMM},
    "narrow": _narrow,
}
"""What makes each encoder, and the channels of its last feature map; all but `narrow` need timm."""

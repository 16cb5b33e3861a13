"""The distinct convolutions and matrix products of some models at batch 1, with how often each occurs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYERS", "Layer"]


@dataclass(frozen=True)
class Layer:
    """A square convolution with padding (kernel - 1) / 2, or (kernel 0) a product of `size` rows."""

    model: str
    inputs: int
    outputs: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    count: int = 1

    @property
    def name(self) -> str:
        if not self.kernel:
            return f"{self.size} x {self.inputs} x {self.outputs}"
        kind = f"{self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride > 1 else "")
        depthwise = " depthwise" if self.groups > 1 else ""
        return f"{self.inputs} > {self.outputs} {kind}{depthwise} @{self.size}"


def _resnet() -> list[Layer]:
    rows = [(3, 64, 224, 7, 2, 1), (64, 64, 56, 1, 1, 1), (64, 64, 56, 3, 1, 3), (64, 256, 56, 1, 1, 4),
            (256, 64, 56, 1, 1, 2), (256, 128, 56, 1, 1, 1), (128, 128, 56, 3, 2, 1), (128, 512, 28, 1, 1, 4),
            (256, 512, 56, 1, 2, 1), (512, 128, 28, 1, 1, 3), (128, 128, 28, 3, 1, 3), (512, 256, 28, 1, 1, 1),
            (256, 256, 28, 3, 2, 1), (256, 1024, 14, 1, 1, 6), (512, 1024, 28, 1, 2, 1), (1024, 256, 14, 1, 1, 5),
            (256, 256, 14, 3, 1, 5), (1024, 512, 14, 1, 1, 1), (512, 512, 14, 3, 2, 1), (512, 2048, 7, 1, 1, 3),
            (1024, 2048, 14, 1, 2, 1), (2048, 512, 7, 1, 1, 2), (512, 512, 7, 3, 1, 2)]  # fmt: skip
    return [Layer("ResNet-50", i, o, s, k, stride, count=n) for i, o, s, k, stride, n in rows]


def _mobile() -> list[Layer]:
    depthwise = [(16, 112, 3, 1), (64, 112, 3, 2), (72, 56, 3, 1), (72, 56, 5, 2), (120, 28, 5, 1), (240, 28, 3, 2),
                 (200, 14, 3, 1), (184, 14, 3, 1), (480, 14, 3, 1), (672, 14, 3, 1), (672, 14, 5, 2),
                 (960, 7, 5, 1)]  # fmt: skip
    points = [(16, 64, 112), (64, 24, 56), (24, 72, 56), (72, 40, 28), (40, 120, 28), (120, 40, 28), (40, 240, 28),
              (240, 80, 14), (80, 200, 14), (80, 480, 14), (480, 112, 14), (112, 672, 14), (672, 160, 7),
              (160, 960, 7), (960, 160, 7)]  # fmt: skip
    return [
        Layer("MobileNetV3", 3, 16, 224, 3, 2),
        *(Layer("MobileNetV3", c, c, s, k, stride, c) for c, s, k, stride in depthwise),
        *(Layer("MobileNetV3", i, o, s) for i, o, s in points),
    ]


def _efficient() -> list[Layer]:
    depthwise = [(32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1), (240, 28, 3, 2),
                 (480, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1), (672, 14, 5, 2), (1152, 7, 5, 1),
                 (1152, 7, 3, 1)]  # fmt: skip
    return [Layer("EfficientNet-Lite0", c, c, s, k, stride, c) for c, s, k, stride in depthwise]


def _vit() -> list[Layer]:
    rows = [(384, 1152, 12), (384, 384, 12), (384, 1536, 12), (1536, 384, 12)]
    return [Layer("ViT-S/16", i, o, 197, 0, count=n) for i, o, n in rows]


LAYERS = [*_resnet(), *_mobile(), *_efficient(), *_vit()]

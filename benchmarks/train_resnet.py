"""Train what `prune_quality.py --resnet` prunes: transformers' ResNet-18 or 50, narrow, on Fashion-MNIST.

    python benchmarks/train_resnet.py --layers 18 -o tests/data/resnet18-fashion-mnist
    python benchmarks/train_resnet.py --layers 50 -o tests/data/resnet50-fashion-mnist

A GPU takes a minute or two. Pictures are scaled to 56 x 56, flipped and shifted. Kernels are rounded to BF16 when
training is over; the top-1 accuracy that is written into the configuration is that of the rounded network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from fashion_mnist import CLASSES, PLACE, read
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["SIZE", "ResNet"]

SIZE = 56
_SHIFT = 4  # pixels


class ResNet(nn.Module):
    """Logits of pictures float32 [N, 1, 56, 56] in -1..1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def trained(cls, folder: Path) -> ResNet:
        """Load what this program wrote, in float32."""
        model = transformers.ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def main() -> None:
    """Train, round, score and save."""
    parser = argparse.ArgumentParser(description="Train a narrow ResNet on Fashion-MNIST.")
    parser.add_argument("--layers", type=int, choices=sorted(_SHAPES), default=18)
    parser.add_argument("--data", type=Path, default=PLACE, help="folder of the data set")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, id2label=dict(enumerate(CLASSES)), label2id={name: at for at, name in enumerate(CLASSES)},
        **_SHAPES[options.layers],
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).to(
        options.device, memory_format=torch.channels_last
    )
    pictures, labels = _on(options.device, *read(options.data, "train"))
    _train(model, pictures, labels, options.epochs, options.batch)
    kept = {name: t.bfloat16() if t.dim() == 4 else t for name, t in model.state_dict().items()}
    model.load_state_dict(kept)  # rounds
    config.top1 = _top1(model, *_on(options.device, *read(options.data, "t10k")))
    config.architectures = ["ResNetForImageClassification"]
    config.save_pretrained(options.output)
    file = options.output / "model.safetensors"
    save_file({name: t.cpu().contiguous() for name, t in kept.items()}, file, {"format": "pt"})
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, top-1 {config.top1:.4f}")


_SHAPES = {
    18: {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 128, 256],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
    },
    50: {
        "embedding_size": 24,
        "hidden_sizes": [80, 160, 320, 640],
        "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
    },
}  # half, and 5/16, of the usual width


def _on(device: str, pictures: object, labels: object) -> tuple[Tensor, Tensor]:
    """Scale to [N, 1, 56, 56] in -1..1, as `pixels=signed` has it."""
    x = torch.tensor(pictures, device=device)[:, None].float() / 127.5 - 1
    x = torch.cat([F.interpolate(part, size=(SIZE, SIZE), mode="bilinear") for part in x.split(4096)])
    return x, torch.tensor(labels, device=device)


def _train(model: nn.Module, pictures: Tensor, labels: Tensor, epochs: int, batch: int) -> None:
    steps = len(pictures) // batch
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, epochs * steps, pct_start=0.2)
    model.train()
    for epoch in range(epochs):
        total = torch.zeros((), device=pictures.device)
        for chosen in torch.randperm(len(pictures), device=pictures.device)[: steps * batch].split(batch):
            x = _varied(pictures[chosen]).to(memory_format=torch.channels_last)
            with torch.autocast(pictures.device.type, torch.bfloat16):
                logits = model(x).logits
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach()
        print(f"epoch {epoch + 1} of {epochs}: loss {float(total) / steps:.4f}", flush=True)


def _varied(x: Tensor) -> Tensor:
    """Flip half of the pictures, and shift each."""
    flipped = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    x = F.pad(torch.where(flipped, x.flip(-1), x), [_SHIFT] * 4, value=-1.0)
    top, left = torch.randint(2 * _SHIFT + 1, (2, len(x), 1), device=x.device)
    along = torch.arange(SIZE, device=x.device)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return x[each, 0, (top + along)[:, :, None], (left + along)[:, None, :]][:, None]


@torch.no_grad()
def _top1(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    model.eval()
    found = torch.cat([model(x).logits.argmax(-1) for x in pictures.split(500)])
    return round(float((found == labels).float().mean()), 4)


if __name__ == "__main__":
    main()

"""Train all variants on generated clips, on a GPU, and say how many of the test's they get right.

python -m examples.action_recognition.train --seeds 0 1 2 --output results    # on an H100, 4 to 7 minutes a seed
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import CLASSES, Clips, normalised
from .distillation import distillation_loss
from .model import TwoStream
from .variants import VARIANTS, make, save

__all__ = ["accuracies", "train"]

_KEPT = ("VTN", "VTN of differences")
_BATCH = 128
_CLIPS = 32 * 1024  # of training
_TESTED = 4 * 1024


def main() -> None:
    """Train every variant for every seed; write `seed-N.json`, and the weights of the first seed."""
    parser = argparse.ArgumentParser(description="Train the variants of action recognition.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1900, help="of each variant, of 128 clips")
    parser.add_argument("--clips", type=int, default=_CLIPS, help="different clips to train on")
    parser.add_argument("--labelled", type=int, help="how many of them have labels (default: all)")
    parser.add_argument("--tested", type=int, default=_TESTED, help="clips to test on")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    test = _drawn(Clips("test", 1 << 20, options.device), options.tested)
    for seed in options.seeds:
        pixels, labels = _drawn(Clips("train", seed, options.device), options.clips)
        clips = pixels, labels[: options.labelled]
        models: dict[str, nn.Module] = {}
        found: dict[str, Any] = {}
        for variant in options.variants:
            began = time.perf_counter()
            models[variant] = _made(variant, seed, models, clips, options)
            found[variant] = accuracies(models[variant], test)
            found[variant]["seconds"] = round(time.perf_counter() - began, 1)
            print(seed, variant, found[variant], flush=True)
            (options.output / f"seed-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
            if variant in _KEPT and seed == options.seeds[0]:
                save(models[variant], variant, options.output)


def _made(
    variant: str, seed: int, models: dict[str, nn.Module], clips: tuple[Tensor, Tensor], options: Any
) -> nn.Module:
    if variant == "two streams":
        return TwoStream(models["VTN"], models["VTN of differences"])
    teacher = models["two streams"] if variant == "VTN, distilled" else None
    return train(make(variant, seed), clips, options.steps, seed, teacher)


def train(
    model: nn.Module, clips: tuple[Tensor, Tensor], steps: int, seed: int, teacher: nn.Module | None = None
) -> nn.Module:
    """Train a model on clips uint8 `[N, T, 3, H, W]` and labels int64 `[M <= N]`, and return it in evaluation mode.

    AdamW with a cosine schedule, on a GPU in BF16. With a teacher, the loss is that of distillation; it has something
    to say of clips without a label too, so half of each batch is drawn from all clips then.
    """
    pixels, labels = clips
    taught = _logits(teacher, pixels) if teacher else None
    model = model.to(pixels.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.02, fused=pixels.is_cuda)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min((at + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * at / steps))
    )
    generator = torch.Generator(pixels.device).manual_seed(seed)
    batch = min(_BATCH, len(labels))
    for _ in range(steps):
        drawn = [len(labels)] if taught is None else [len(labels), len(pixels)]
        chosen = torch.cat(
            [
                torch.randint(of, (batch // len(drawn),), generator=generator, device=pixels.device)
                for of in drawn
            ]
        )
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
            logits = model(normalised(pixels[chosen])).float()
        if taught is None:
            loss = nn.functional.cross_entropy(logits, labels[chosen])
        else:
            loss = distillation_loss(logits, taught[chosen], labels[chosen[: batch // 2]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracies(model: nn.Module, clips: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return the share of clips that a model gets right, in percent, of all and of each class."""
    pixels, labels = clips
    right = (_logits(model, pixels).argmax(-1) == labels).float() * 100
    each = {name: round(float(right[labels == at].mean()), 1) for at, name in enumerate(CLASSES)}
    return {"all": round(float(right.mean()), 2), **each}


@torch.no_grad()
def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        return torch.cat([model(normalised(part)).float() for part in pixels.split(256)])


def _drawn(source: Clips, count: int) -> tuple[Tensor, Tensor]:
    """Make clips of all classes in turn."""
    labels = torch.arange(count, device=source.device) % len(CLASSES)
    return torch.cat([source.batch(part) for part in labels.split(256)]), labels


if __name__ == "__main__":
    main()

"""Train the networks, on a GPU where there is one.

    python -m examples.replay_detection.train DATA -o WEIGHTS --networks lcnn lcnn-gru --seeds 0 1 2

Weights of the epoch with the least equal error rate on dev go to WEIGHTS/NETWORK-SEED.safetensors, a line of JSON an
epoch to standard output.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .asvspoof import read_trials
from .detector import NETWORKS, Detector, network, read_pcm
from .metrics import eer

__all__ = ["fit_network", "images", "scores"]


def images(detector: Detector, recordings: list[Tensor], device: str) -> Tensor:
    """Return what the network sees of recordings, float16 `[recordings, 1, 864, 400]`."""
    detector.to(device)
    with torch.no_grad():
        return torch.cat([detector.image(audio.to(device)).half() for audio in recordings])


def fit_network(
    net: nn.Module, seen: Tensor, labels: Tensor, *, epochs: int, rate: float, seed: int, batch: int = 64
) -> Iterator[float]:
    """Train by cross-entropy and Adam, and give the mean loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-3)
    steps = epochs * -(-len(seen) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.15)
    for _ in range(epochs):
        net.train()
        losses = []
        for chosen in torch.randperm(len(seen), generator=generator).split(batch):
            x = augmented(seen[chosen.to(seen.device)].float(), generator)
            with torch.autocast(seen.device.type, torch.bfloat16, enabled=seen.is_cuda):
                logits = net(x)
            loss = nn.functional.cross_entropy(
                logits.float(), labels[chosen.to(labels.device)], label_smoothing=0.05
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        yield float(torch.stack(losses).mean())


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each image in time, and hide a band of times and one of frequencies (SpecAugment, 1904.08779)."""
    count, _, bins, frames = x.shape
    shifts = torch.randint(frames, (count, 1), generator=generator)
    index = ((torch.arange(frames) + shifts) % frames).to(x.device)
    x = x.gather(3, index[:, None, None].expand(x.shape))
    for dim, size, widest in ((2, bins, 100), (3, frames, 60)):
        width = torch.randint(widest, (count, 1), generator=generator)
        begin = torch.randint(size, (count, 1), generator=generator)
        at = torch.arange(size)
        hidden = ((at >= begin) & (at < begin + width)).to(x.device)
        x = x.masked_fill(hidden[:, None].unsqueeze(5 - dim), 0.0)
    return x


def scores(net: nn.Module, seen: Tensor, batch: int = 128) -> np.ndarray:
    """Score images in float32."""
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(part.float()) for part in seen.split(batch)])
    return (logits[:, 1] - logits[:, 0]).cpu().numpy()


def main() -> None:
    """Train each network from each seed."""
    parser = argparse.ArgumentParser(description="Train the networks of replay detection.")
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which no network is begun"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    began, front = time.perf_counter(), None
    trials = {part: read_trials(options.data, part) for part in ("train", "dev")}
    labels = {part: torch.tensor([int(t.genuine) for t in of], device=device) for part, of in trials.items()}
    recordings = {part: read_pcm(t.path for t in of) for part, of in trials.items()}
    for name in options.networks:
        if front is not NETWORKS[name][0]:
            front = NETWORKS[name][0]
            seen = {part: images(network(name), of, device) for part, of in recordings.items()}
        for seed in options.seeds:
            if time.perf_counter() - began > options.limit:
                return
            torch.manual_seed(seed)
            net, best = network(name).network.to(device), 1.0
            losses = fit_network(
                net, seen["train"], labels["train"], epochs=options.epochs, rate=options.rate, seed=seed
            )
            for epoch, loss in enumerate(losses):
                found = scores(net, seen["dev"])
                genuine = labels["dev"].cpu().numpy().astype(bool)
                error = eer(found[genuine], found[~genuine])
                spent = round(time.perf_counter() - began, 1)
                row = {
                    "network": name,
                    "seed": seed,
                    "epoch": epoch,
                    "loss": loss,
                    "dev_eer": error,
                    "s": spent,
                }
                print(json.dumps(row), flush=True)
                if error < best:
                    best = error
                    kept = {key: value.half().cpu() for key, value in net.state_dict().items()}
                    save_file(kept, options.output / f"{name}-{seed}.safetensors", {"dev_eer": str(error)})


if __name__ == "__main__":
    main()

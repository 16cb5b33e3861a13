"""Fit what is not a network: mixtures, i-vectors and the SVM on train, the fusion on dev.

    python -m examples.replay_detection.fit DATA NETWORKS

NETWORKS is the folder that `train` wrote. Of each network the weights with the least error on dev are taken.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from specqd.errors import InputError

from . import systems
from .asvspoof import read_trials
from .compiling import compile_audio
from .detector import read_pcm
from .spectra import fit
from .systems import Systems

__all__ = ["main"]


def main() -> None:
    """Fit all and write the weights."""
    parser = argparse.ArgumentParser(description="Fit mixtures, i-vectors and the fusion.")
    parser.add_argument("data", type=Path)
    parser.add_argument("networks", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=systems.WEIGHTS)
    parser.add_argument("--every", type=int, default=1, help="fit to every so many trials of train")
    options = parser.parse_args()
    trials = {
        "train": read_trials(options.data, "train")[:: options.every],
        "dev": read_trials(options.data, "dev"),
    }
    genuine = {part: np.array([trial.genuine for trial in of]) for part, of in trials.items()}
    audio = {part: read_pcm(trial.path for trial in of) for part, of in trials.items()}
    every = Systems().eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(scratch)
        _load_networks(every, options.networks)
        samples = every.fourier.samples
        for name in ("cqcc", "lpcc", "embedding"):
            front = _Embedding(every) if name == "embedding" else getattr(every, name)
            run = compile_audio(front, folder / name, least=samples)
            found = [np.asarray(run(fit(x, samples))) for x in audio["train"]]
            if name == "lpcc":
                every.ivectors.fit(found)
                vectors = [every.ivectors(torch.from_numpy(x)).numpy() for x in found]
                every.svm.fit(np.stack(vectors), genuine["train"])
            else:
                ratio = every.cqcc_gmm if name == "cqcc" else every.embedding_gmm
                ratio.fit(*(_frames(found, genuine["train"] == kind, 40_000) for kind in (True, False)))
        run = compile_audio(every, folder / "systems")
        scores = np.stack([run(x)[0] for x in audio["dev"]])[:, : len(systems.NAMES)]
    every.fusion.fit(scores, genuine["dev"])
    systems.save(every, options.output)


class _Embedding(nn.Module):
    def __init__(self, of: Systems) -> None:
        super().__init__()
        self.front, self.lcnn = of.fourier, of.lcnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lcnn.embed(systems.normalised(self.front(x))[None, None])


def _load_networks(every: Systems, weights: Path) -> None:
    """Load each network's weights with the least error on dev, which `train` wrote beside them."""
    for name, module in (("lcnn", every.lcnn), ("lcnn-gru", every.lcnn_gru)):
        errors = {}
        for path in weights.glob(f"{name}-[0-9]*.safetensors"):
            with safe_open(path, "pt") as file:
                errors[path] = float(file.metadata()["dev_eer"])
        if not errors:
            raise InputError(f"{weights} has no {name}-SEED.safetensors; make them with the module `train`")
        best = min(errors, key=errors.__getitem__)
        print(f"{best.stem}: {100 * errors[best]:.2f} % on dev", flush=True)
        module.load_state_dict({key: value.float() for key, value in load_file(best).items()})


def _frames(found: list[np.ndarray], chosen: np.ndarray, most: int) -> np.ndarray:
    frames = np.concatenate([x for x, take in zip(found, chosen, strict=True) if take])
    return frames[:: -(-len(frames) // most)]


if __name__ == "__main__":
    main()

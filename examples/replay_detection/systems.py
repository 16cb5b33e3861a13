"""All systems and their fusion in one module: raw audio to scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specqd.errors import InputError

from .cepstra import CQCC, LPCC, Deltas
from .ivectors import IVectors, LinearSVM
from .lcnn import LCNN, LCNNGRU
from .mixtures import LikelihoodRatio
from .spectra import Fourier, fit, normalised

__all__ = ["NAMES", "WEIGHTS", "Fusion", "Systems", "load", "save"]

WEIGHTS = Path(__file__).parent / "weights.safetensors"
NAMES = ("cqcc-gmm", "ivector-svm", "lcnn", "lcnn-gmm", "lcnn-gru")
"""CQCC and two mixtures; i-vectors of LPCC and an SVM; the LCNN's logits; mixtures on its embedding; LCNN and GRU."""


class Fusion(nn.Module):
    """Logistic regression of scores `[systems]` to the logarithm of the odds `[]`."""

    def __init__(self, systems: int) -> None:
        """Make one of no meaning until `fit` or weights are loaded."""
        super().__init__()
        self.register_buffer("weights", torch.zeros(systems))
        self.register_buffer("offset", torch.zeros(()))

    def fit(self, scores: np.ndarray, genuine: np.ndarray) -> None:
        """Fit to `[trials, systems]` with scikit-learn, both kinds weighing alike."""
        from sklearn.linear_model import LogisticRegression

        mean, scale = scores.mean(0), scores.std(0)
        found = LogisticRegression(class_weight="balanced").fit((scores - mean) / scale, genuine)
        weights = found.coef_[0] / scale
        self.weights.copy_(torch.from_numpy(weights))
        self.offset.copy_(torch.as_tensor(found.intercept_[0] - weights @ mean))

    def forward(self, scores: Tensor) -> Tensor:
        """Return the fused score."""
        return scores @ self.weights + self.offset


class Systems(nn.Module):
    """Audio `[time]`, float32 in [-1, 1] at 16 kHz, to the scores of NAMES and the fused one, `[6]`, and a spectrogram.

    A higher score is more genuine. The spectrogram is the logarithm of the power, `[864, 400]`. Of the audio the first
    3.35 s are looked at; less is repeated.
    """

    def __init__(self) -> None:
        """Make all, without weights."""
        super().__init__()
        self.fourier = Fourier()
        self.cqcc, self.lpcc = nn.Sequential(CQCC(), Deltas()), nn.Sequential(LPCC(), Deltas())
        self.cqcc_gmm = LikelihoodRatio(512, 90)
        self.ivectors, self.svm = IVectors(), LinearSVM(50)
        self.lcnn, self.lcnn_gru = LCNN(), LCNNGRU()
        self.embedding_gmm = LikelihoodRatio(1, 32)
        self.fusion = Fusion(len(NAMES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and spectrogram."""
        x = fit(x, self.fourier.samples)
        levels = self.fourier(x)
        image = normalised(levels)[None, None]
        embedding = self.lcnn.embed(image)
        logits = [self.lcnn.classes(embedding)[0], self.lcnn_gru(image)[0]]
        lcnn, gru = (of[1] - of[0] for of in logits)
        cqcc, ivector = self.cqcc_gmm(self.cqcc(x)), self.svm(self.ivectors(self.lpcc(x)))
        scores = torch.stack([cqcc, ivector, lcnn, self.embedding_gmm(embedding), gru])
        return torch.cat([scores, self.fusion(scores)[None]]), levels


def save(systems: Systems, path: Path = WEIGHTS) -> None:
    """Write the weights: those of networks in 16 bits, which changes scores by less than 0.01."""
    networks = ("lcnn.", "lcnn_gru.")
    state = systems.state_dict()
    save_file({k: v.half() if k.startswith(networks) else v.contiguous() for k, v in state.items()}, path)


def load(path: Path = WEIGHTS) -> Systems:
    """Return all systems with their weights, for scoring; raises InputError if there are none."""
    if not path.is_file():
        raise InputError(f"there are no weights at {path}; make them with examples.replay_detection.fit")
    systems = Systems()
    systems.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return systems.eval().requires_grad_(False)

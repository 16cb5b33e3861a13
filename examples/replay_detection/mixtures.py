"""Gaussian mixtures with diagonal covariances as torch modules, made of those that scikit-learn fits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

__all__ = ["LikelihoodRatio", "Mixture", "Standard"]


class Standard(nn.Module):
    """Take off a mean and divide by a deviation, `[..., dim]`: what products of squares need in float32."""

    def __init__(self, dim: int) -> None:
        """Leave everything as it is until `fit`."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, x: np.ndarray) -> None:
        """Take mean and deviation of `[samples, dim]`."""
        self.mean.copy_(torch.from_numpy(x.mean(0)))
        self.scale.copy_(torch.from_numpy(1 / (x.std(0) + 1e-6)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised."""
        return (x - self.mean) * self.scale


class Mixture(nn.Module):
    """The logarithm of the density of each component, times its weight: `[samples, dim]` to `[samples, components]`."""

    def __init__(self, components: int, dim: int) -> None:
        """Make one of no meaning until `fit` or weights are loaded."""
        super().__init__()
        self.register_buffer("squares", torch.zeros(dim, components))
        self.register_buffer("linear", torch.zeros(dim, components))
        self.register_buffer("constant", torch.zeros(components))

    def fit(self, fitted: GaussianMixture) -> None:
        """Take the parameters of a mixture of scikit-learn with `covariance_type="diag"`."""
        precisions, means = fitted.precisions_, fitted.means_
        constant = np.log(fitted.weights_) + 0.5 * np.log(precisions).sum(1)
        constant -= 0.5 * (means**2 * precisions).sum(1) + 0.5 * means.shape[1] * math.log(2 * math.pi)
        for kept, found in (
            (self.squares, -0.5 * precisions.T),
            (self.linear, (means * precisions).T),
            (self.constant, constant),
        ):
            kept.copy_(torch.from_numpy(found))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithms."""
        return (x * x) @ self.squares + x @ self.linear + self.constant


class LikelihoodRatio(nn.Module):
    """The mean over frames `[frames, dim]` of the logarithm of how much likelier genuine speech is; `[]`."""

    def __init__(self, components: int, dim: int) -> None:
        """Make two mixtures."""
        super().__init__()
        self.standard = Standard(dim)
        self.genuine, self.spoof = Mixture(components, dim), Mixture(components, dim)

    def fit(self, genuine: np.ndarray, spoof: np.ndarray, seed: int = 0, iterations: int = 30) -> None:
        """Fit to frames of both kinds `[frames, dim]` by expectation and maximisation from drawn frames."""
        from sklearn.mixture import GaussianMixture

        self.standard.fit(np.concatenate([genuine, spoof]))
        for mixture, frames in ((self.genuine, genuine), (self.spoof, spoof)):
            found = GaussianMixture(
                len(mixture.constant), covariance_type="diag", init_params="random_from_data", tol=1e-3,
                max_iter=iterations, random_state=seed, reg_covar=1e-3,
            )  # fmt: skip
            mixture.fit(found.fit(self.standard(torch.from_numpy(frames)).numpy()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the score."""
        x = self.standard(x)
        return (self.genuine(x).logsumexp(1) - self.spoof(x).logsumexp(1)).mean()

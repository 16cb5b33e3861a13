"""i-vectors (Dehak et al., 2011), where an utterance lies in the space of a mixture's means, and a linear SVM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .mixtures import Mixture, Standard

__all__ = ["IVectors", "LinearSVM", "solve"]


def solve(matrix: Tensor, right: Tensor, steps: int) -> Tensor:
    """Solve `matrix [n, n] @ x = right [n]`, symmetric and positive, by conjugate gradients scaled by the diagonal.

    Compiled code has no factorisations; `n` steps would be exact but for rounding, and i-vectors need fewer.
    """
    scale = matrix.diagonal().rsqrt()
    matrix, residual = matrix * scale[:, None] * scale, right * scale
    x, direction, norm = torch.zeros_like(right), residual, residual @ residual
    for _ in range(steps):
        along = matrix @ direction
        step = norm / (direction @ along + 1e-30)
        x, residual = x + step * direction, residual - step * along
        before, norm = norm, residual @ residual
        direction = residual + norm / (before + 1e-30) * direction
    return x * scale


class IVectors(nn.Module):
    """Frames `[frames, dim]` to an i-vector `[rank]` of the length 1."""

    def __init__(self, components: int = 64, dim: int = 60, rank: int = 50, steps: int = 25) -> None:
        """Make one of no meaning until `fit` or weights are loaded."""
        super().__init__()
        self.steps = steps
        self.standard, self.background = Standard(dim), Mixture(components, dim)
        self.register_buffer("means", torch.zeros(components, dim))
        self.register_buffer("deviations", torch.ones(components, dim))
        self.register_buffer("loadings", torch.zeros(components, dim, rank))
        self.register_buffer("centre", torch.zeros(rank))

    def fit(
        self, utterances: Sequence[np.ndarray], *, iterations: int = 6, seed: int = 0, every: int = 4
    ) -> None:
        """Fit the mixture to every so many frames, then the loadings by expectation and maximisation."""
        from sklearn.mixture import GaussianMixture

        frames = np.concatenate(utterances)[::every]
        self.standard.fit(frames)
        mixture = GaussianMixture(
            len(self.means), covariance_type="diag", init_params="random_from_data", max_iter=30, random_state=seed,
            reg_covar=1e-3,
        ).fit(self.standard(torch.from_numpy(frames)).numpy())  # fmt: skip
        self.background.fit(mixture)
        self.means.copy_(torch.from_numpy(mixture.means_))
        self.deviations.copy_(torch.from_numpy(np.sqrt(mixture.covariances_)))
        self.loadings.copy_(
            torch.randn(self.loadings.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        )
        counts, sums = (
            torch.stack(of)
            for of in zip(*map(self._statistics, map(torch.from_numpy, utterances)), strict=True)
        )
        for _ in range(iterations):
            covariance = torch.linalg.inv(self._precision(counts))  # [utterances, rank, rank]
            found = (covariance @ (sums.flatten(1) @ self.loadings.flatten(0, 1))[:, :, None])[:, :, 0]
            second = covariance + found[:, :, None] * found[:, None]
            weighted = torch.einsum("uc,urs->crs", counts, second)
            crossed = torch.einsum("ucd,ur->cdr", sums, found)
            self.loadings.copy_(
                torch.linalg.solve(weighted + 1e-3 * torch.eye(weighted.shape[1]), crossed, left=False)
            )
        self.centre.copy_(found.mean(0))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many frames each component has `[components]`, and their whitened sums `[components, dim]`."""
        x = self.standard(x)
        share = self.background(x).softmax(1)
        counts = share.sum(0)
        return counts, (share.T @ x - counts[:, None] * self.means) / self.deviations

    def _precision(self, counts: Tensor) -> Tensor:
        """Return the identity and what the frames `[..., components]` add to it, `[..., rank, rank]`."""
        rank = self.loadings.shape[2]
        products = (self.loadings.transpose(1, 2) @ self.loadings).flatten(1)
        return torch.eye(rank) + (counts @ products).unflatten(-1, (rank, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the posterior, centred and normalised."""
        counts, sums = self._statistics(x)
        right = sums.flatten() @ self.loadings.flatten(0, 1)
        found = solve(self._precision(counts[None])[0], right, self.steps) - self.centre
        return found / (found.square().sum().sqrt() + 1e-6)


class LinearSVM(nn.Module):
    """The signed distance from a plane, `[dim]` to `[]`."""

    def __init__(self, dim: int) -> None:
        """Make one of no meaning until `fit` or weights are loaded."""
        super().__init__()
        self.register_buffer("normal", torch.zeros(dim))
        self.register_buffer("offset", torch.zeros(()))

    def fit(self, x: np.ndarray, genuine: np.ndarray, cost: float = 1.0, seed: int = 0) -> None:
        """Fit with scikit-learn to `[samples, dim]`, both kinds weighing alike."""
        from sklearn.svm import LinearSVC

        found = LinearSVC(C=cost, class_weight="balanced", random_state=seed).fit(x, genuine)
        self.normal.copy_(torch.from_numpy(found.coef_[0]))
        self.offset.copy_(torch.as_tensor(found.intercept_[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the score."""
        return x @ self.normal + self.offset

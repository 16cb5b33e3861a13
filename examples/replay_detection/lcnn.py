"""Light convolutional networks with max-feature-map activations (Lavrentyeva et al., Interspeech 2017, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LCNN", "LCNNGRU", "MaxFeatureMap"]


class MaxFeatureMap(nn.Module):
    """The larger of the two halves of the channels `[batch, 2 * channels, ...]`: MFM 2/1 of Wu et al., 1511.02683."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, channels, ...]`."""
        first, second = x.chunk(2, 1)
        return torch.maximum(first, second)


class _Block(nn.Sequential):
    """A network in network of 1 x 1, then a convolution of 3 x 3, each with MFM; pooled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, 2 * inputs, 1),
            MaxFeatureMap(),
            nn.Conv2d(inputs, 2 * outputs, 3, padding=1),
            MaxFeatureMap(),
            nn.MaxPool2d(2),
        )


class LCNN(nn.Module):
    """LCNN-9: nine convolutions, an embedding of 32 numbers, two classes; 371,874 parameters.

    Input `[batch, 1, 864, 400]`, a normalised spectrogram; output `[batch, 2]`, logits of spoof and genuine.
    """

    def __init__(self, dropout: float = 0.7) -> None:
        """Draw weights by Xavier's rule."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            MaxFeatureMap(),
            nn.MaxPool2d(2),
            _Block(16, 24),
            _Block(24, 32),
            _Block(32, 16),
            _Block(16, 16),
            nn.Flatten(),
        )
        self.embedding = nn.Sequential(nn.Linear(27 * 12 * 16, 64), MaxFeatureMap())
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(32, 2)
        _initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        """Return the embedding `[batch, 32]`."""
        return self.embedding(self.features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.classes(self.dropout(self.embed(x)))


class LCNNGRU(nn.Module):
    """A reduced LCNN that keeps time, and a bidirectional GRU over 12 steps of it (section 3.4; the sizes are ours).

    Input and output as LCNN's; what it looks at are means of 2 x 2 elements.
    """

    def __init__(self, hidden: int = 32, dropout: float = 0.5) -> None:
        """Draw weights by Xavier's rule."""
        super().__init__()
        self.features = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(1, 16, 5, padding=2),
            MaxFeatureMap(),
            nn.MaxPool2d(2),
            _Block(8, 16),
            _Block(16, 16),
            _Block(16, 8),
        )
        self.gru = nn.GRU(27 * 8, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(2 * hidden, 2)
        _initialise(self)

    def embed(self, x: Tensor) -> Tensor:
        """Return the mean of the GRU's states over time, `[batch, 2 * hidden]`."""
        x = self.features(x)  # [batch, 8, 27, 12]
        states, _ = self.gru(x.flatten(1, 2).transpose(1, 2))
        return states.mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.classes(self.dropout(self.embed(x)))


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

"""What the transformer is compared with: the mean of what each frame says alone, and a recurrent head."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FrameMean", "Recurrent"]


class FrameMean(nn.Module):
    """Embeddings `[B, T, dim]` become the mean of the frames' logits; the order of the frames is lost."""

    def __init__(self, classes: int, *, dim: int = 512) -> None:
        """Make the classifier of one frame."""
        super().__init__()
        self.classifier = nn.Linear(dim, classes)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Average what is decided frame by frame."""
        return self.classifier(embeddings).mean(1)


class Recurrent(nn.Module):
    """Embeddings `[B, T, dim]` go through an LSTM, whose last state decides."""

    def __init__(self, classes: int, *, dim: int = 512) -> None:
        """Make one layer, as wide as the embeddings."""
        super().__init__()
        self.recurrence = nn.LSTM(dim, dim, batch_first=True)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Decide at the last frame."""
        return self.classifier(self.recurrence(embeddings)[0][:, -1])

"""The Video Transformer Network: a 2-D encoder of each frame, then self-attention over the frames of a clip."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .encoders import FrameEncoder

__all__ = ["ClipModel", "Transformer", "TwoStream", "sinusoids"]


class ClipModel(nn.Module):
    """Clips float32 `[B, T, 3, H, W]` become logits `[B, classes]`: each frame is embedded, a head sees them all.

    With `difference`, what is embedded is the difference of each frame to the one before, so T - 1 of them.
    """

    def __init__(self, encoder: FrameEncoder, head: nn.Module, *, difference: bool = False) -> None:
        """Join an encoder of frames `[N, 3, H, W] -> [N, dim]` and a head `[B, T, dim] -> [B, classes]`."""
        super().__init__()
        self.encoder, self.head, self.difference = encoder, head, difference

    def forward(self, clip: Tensor) -> Tensor:
        """Embed the frames, or their differences, then decide."""
        if self.difference:
            clip = clip[:, 1:] - clip[:, :-1]
        embeddings = self.encoder(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return self.head(embeddings)


class TwoStream(nn.Module):
    """The mean of the logits of a model of frames and of one of their differences."""

    def __init__(self, rgb: nn.Module, difference: nn.Module) -> None:
        """Join two models of clips."""
        super().__init__()
        self.rgb, self.difference = rgb, difference

    def forward(self, clip: Tensor) -> Tensor:
        """Add the halves."""
        return 0.5 * self.rgb(clip) + 0.5 * self.difference(clip)


class Transformer(nn.Module):
    """Embeddings `[B, T, dim]` of up to `frames` frames become logits: positions, blocks, the mean over the frames."""

    def __init__(
        self, classes: int, frames: int = 16, *, dim: int = 512, heads: int = 8, blocks: int = 4,
        positions: bool = True,
    ) -> None:  # fmt: skip
        """Make it with the initial values of the paper's code."""
        super().__init__()
        self.positions = nn.Parameter(sinusoids(frames, dim)) if positions else None
        if self.positions is not None:  # the first row stays zero, as that of a padding index does
            self.positions.register_hook(
                lambda gradient: gradient.index_fill(0, torch.tensor(0, device=gradient.device), 0)
            )
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(blocks)))
        self.classifier = nn.Linear(dim, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Average what is decided frame by frame."""
        if self.positions is not None:
            embeddings = embeddings + self.positions[: embeddings.shape[1]]
        return self.classifier(self.blocks(embeddings)).mean(1)


class _Block(nn.Module):
    """Self-attention of all frames without an output projection, then two linears; norms behind the residuals."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        for each in (self.q, self.k, self.v):
            for head in each.weight.chunk(heads):  # a matrix of its own
                nn.init.xavier_normal_(head.data)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.attention_norm, self.norm = _Norm(dim), _Norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        # Scaled by the model's width, not by the head's.
        scale, dropout = 1 / math.sqrt(x.shape[2]), self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        x = self.attention_norm(self.dropout(mixed.transpose(1, 2).flatten(2)) + x)
        return self.norm(self.dropout(self.feed_forward(x)) + x)


class _Norm(nn.Module):
    """A layer norm by the unbiased deviation, to which 1e-3 is added."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.std(-1, keepdim=True) + 1e-3) * self.weight + self.bias


def sinusoids(frames: int, dim: int) -> Tensor:
    """Return positions float32 `[frames, dim]`: sines at even places, cosines at odd ones, zeros in the first row."""
    at, place = torch.arange(frames)[:, None], torch.arange(dim)
    angle = at / 10000 ** (2 * (place // 2) / dim)
    table = torch.where(place % 2 == 0, angle.sin(), angle.cos())
    return table * (at > 0)

"""Distillation of a teacher into a student that sees the same clips (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["distillation_loss"]


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 8.0, weight: float = 0.4
) -> Tensor:
    """Return CE(student, labels) + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)) for a batch.

    Clips without a label count in the second term alone.

    Args:
        student: logits `[B, classes]`.
        teacher: logits `[B, classes]`, without a gradient.
        labels: int64 `[M]`, of the first M <= B clips.
        temperature: T, of the VTN's training code.
        weight: of the second term, likewise.
    """
    soft = (functional.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    divergence = functional.kl_div(*soft, reduction="batchmean", log_target=True)
    return functional.cross_entropy(student[: len(labels)], labels) + weight * temperature**2 * divergence

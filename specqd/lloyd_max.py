"""Lloyd-Max quantisers of a standard normal distribution: the levels with the least mean squared error."""

from __future__ import annotations

from itertools import pairwise

__all__ = ["borders", "magnitudes"]

_MAGNITUDES = {
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
    5: (
        0.0658897, 0.1980518, 0.3313783, 0.4666995, 0.6049336, 0.7471357, 0.8945651, 1.0487833,
        1.2118044, 1.3863403, 1.5762281, 1.7872332, 2.0287284, 2.3177394, 2.6911196, 3.2607325,
    ),
}  # fmt: skip


def magnitudes(bits: int) -> tuple[float, ...]:
    """Return the positive levels of a quantiser of 3, 4 or 5 bits, ascending; the others are their negatives.

    Each is the mean of its cell (Lloyd, Least squares quantization in PCM; Max, Quantizing for minimum distortion).
    """
    return _MAGNITUDES[bits]


def borders(bits: int) -> tuple[float, ...]:
    """Return where the cells of neighbouring positive levels meet: halfway."""
    return tuple((a + b) / 2 for a, b in pairwise(_MAGNITUDES[bits]))

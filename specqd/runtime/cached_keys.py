"""The keys that compiled code has put into a cache, widened to float32 (the layout: codegen/kernels/cache.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from specqd.lloyd_max import magnitudes
from specqd.manifest import BLOCK

__all__ = ["cached_keys"]

_SCALE_BYTES = 2  # of a position's BF16 scale of INT8 keys


def cached_keys(dtype: str, blocks: np.ndarray) -> np.ndarray:
    """Return float32 `[planes, blocks * 16, channels]` of blocks `[planes, blocks, elements]` of a format.

    `dtype` is a name of specqd.cache_formats. Keys of an odd number of channels end with one more, of zeros. Keys that
    lie rotated are given so: norms, and products with each other, are the same.
    """
    channels = _FORMATS[dtype](blocks)
    planes, count, width, _ = channels.shape
    return np.ascontiguousarray(channels.swapaxes(2, 3)).reshape(planes, count * BLOCK, width)


def _bfloat16(blocks: np.ndarray) -> np.ndarray:
    """Pairs of channels in an int32, `[pairs][16]`: the even one in the low half."""
    planes, count, _ = blocks.shape
    pairs = blocks.reshape(planes, count, -1, 1, BLOCK)
    both = np.concatenate([pairs << 16, pairs & np.int32(-65536)], axis=3)
    return both.view(np.float32).reshape(planes, count, -1, BLOCK)


def _int8(blocks: np.ndarray) -> np.ndarray:
    """Channels `[channels][16]`, then 16 scales."""
    planes, count, elements = blocks.shape
    numbers, halves = np.split(blocks, [elements - _SCALE_BYTES * BLOCK], axis=2)
    return numbers.reshape(planes, count, -1, BLOCK).astype(np.float32) * _scales(halves)[:, :, None]


def _turbo(blocks: np.ndarray, bits: int) -> np.ndarray:
    """Codes of neighbouring channels in bytes `[bytes][16]`, signs of odd bits after the rest; then 16 scales."""
    planes, count, elements = blocks.shape
    width = (elements - _SCALE_BYTES * BLOCK) // BLOCK
    channels, index = width * 8 // bits, bits & ~1
    codes, halves = np.split(blocks, [width * BLOCK], axis=2)
    of_index, signs = np.split(
        codes.view(np.uint8).reshape(planes, count, width, BLOCK), [channels * index // 8], 2
    )
    codes = _unpacked(of_index, index) + (_unpacked(signs, 1) << index if bits % 2 else 0)
    levels = np.array(magnitudes(bits), np.float32)
    return np.concatenate([levels, -levels])[codes] * _scales(halves)[:, :, None]


def _unpacked(bytes_: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of so many bits `[..., channels, 16]` from bytes `[..., bytes, 16]`, the first lowest."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    numbers = bytes_[..., None, :] >> shifts & np.uint8((1 << bits) - 1)
    return numbers.reshape(*bytes_.shape[:-2], -1, BLOCK)


def _scales(halves: np.ndarray) -> np.ndarray:
    """Widen BF16 scales that lie in pairs of bytes."""
    return (np.ascontiguousarray(halves).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


_FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bfloat16": _bfloat16,
    "int8": _int8,
    **{f"turbo{bits}": partial(_turbo, bits=bits) for bits in (3, 4, 5)},
}

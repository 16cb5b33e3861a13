"""The keys that compiled code has put into a cache, widened to float32 (the layout: codegen/kernels/cache.py)."""

from __future__ import annotations

import numpy as np

from specqd.manifest import BLOCK

__all__ = ["cached_keys"]

_SCALE_BYTES = 2  # of a position's BF16 scale of INT8 keys


def cached_keys(dtype: str, blocks: np.ndarray) -> np.ndarray:
    """Return float32 `[planes, blocks * 16, channels]` of blocks `[planes, blocks, elements]` of a format.

    `dtype` is a name of specqd.cache_formats. Keys of an odd number of channels end with one more, of zeros.
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
    scales = (np.ascontiguousarray(halves).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return numbers.reshape(planes, count, -1, BLOCK).astype(np.float32) * scales[:, :, None]


_FORMATS = {"bfloat16": _bfloat16, "int8": _int8}

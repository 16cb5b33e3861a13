"""Caches to select from, as every test of selection sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from specqd.selection import KVCrush, Method, Observed, method

HEADS, GROUP, WINDOW, DIM = 3, 2, 8, 16
METHODS = sorted(set(Method.registry) - {"kvcrush"})
WRAPPED = [KVCrush(scorer=method(name), page=page) for name in METHODS for page in (1, 4)]
ALL = [*map(method, METHODS), *WRAPPED]


def rope_angles(dim: int = DIM) -> np.ndarray:
    return (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)


def observed(
    length: int, seed: int = 0, heads: int = HEADS, window: int = WINDOW, **changes: Any
) -> Observed:
    """A cache of random numbers in which some tokens are like others and heads attend unevenly."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(heads, 5, DIM)) * 2
    keys = topics[:, rng.integers(0, 5, length)] + rng.normal(size=(heads, length, DIM))
    arrays = {
        "positions": np.tile(np.arange(length, dtype=np.int32), (heads, 1)),
        "keys": keys.astype(np.float32),
        "values": rng.normal(size=(heads, length, DIM)).astype(np.float32),
        "queries": rng.normal(size=(heads, GROUP, window, DIM)).astype(np.float32),
        "rope": rope_angles(),
    }
    return Observed(**{"scale": DIM**-0.5, **arrays, **changes})

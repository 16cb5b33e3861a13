"""Fashion-MNIST: 70,000 labelled pictures of clothes, 28 x 28 and grey (Xiao et al., arXiv 1708.07747; MIT licence).

Debian's package `dataset-fashion-mnist` brings them.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

__all__ = ["CLASSES", "PLACE", "read"]

PLACE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures uint8 [N, 28, 28] and their classes int64 [N] of a part, `train` (60,000) or `t10k` (10,000)."""
    if not folder.is_dir():
        raise SystemExit(
            f"{folder} is no folder: install Debian's dataset-fashion-mnist, or say where its files are"
        )
    pictures, labels = (
        gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
        for kind in ("images-idx3", "labels-idx1")
    )
    # IDX: a magic number and the sizes before the bytes, 4 bytes each.
    return (
        np.frombuffer(pictures, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )

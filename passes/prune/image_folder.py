"""Images of a folder, some of them by a seed, scaled and cropped to the size that a model takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from specqd.errors import InputError

__all__ = ["image_files", "read_images"]

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_DEEP = ("I", "F")  # Pillow's modes of more than 8 bits begin so


def image_files(folder: Path, count: int, seed: int) -> list[Path]:
    """Return at most `count` of a folder's image files, and of those below it, chosen by the seed.

    Raises:
        InputError: it is no folder, or holds no image.
    """
    if not folder.is_dir():
        raise InputError(
            f"the calibration data {folder} are no folder; give fractals, random or a folder of images"
        )
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(
            f"the folder {folder} holds no images; put some there, as {', '.join(sorted(_SUFFIXES))}"
        )
    chosen = np.random.default_rng(seed).permutation(len(files))[:count]
    return [files[at] for at in chosen]


def read_images(files: Sequence[Path], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield images uint8 [H, W, 3], scaled so that they cover `size` (H, W) and cropped at their centre.

    Raises:
        InputError: a file is no image, or one of more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode.startswith(_DEEP):
                    raise InputError(f"{file} has more than 8 bits a channel ({image.mode}); convert it to 8")
                fitted = ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.BILINEAR)
        except (OSError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot read the image {file}: {error}") from error
        yield np.asarray(fitted)

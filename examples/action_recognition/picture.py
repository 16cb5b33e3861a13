"""Draw a clip of each class, of training and of test: python -m examples.action_recognition.picture classes.jpg."""

from __future__ import annotations

import sys

import torch
from PIL import Image, ImageDraw, ImageFont

from .data import CLASSES, FRAMES, SIZE, Clips

_SHOWN = range(0, FRAMES, 5)
_MARGIN, _GAP = 150, 12


def main() -> None:
    """Write the picture."""
    width = len(_SHOWN) * SIZE
    image = Image.new("RGB", (_MARGIN + 2 * width + _GAP, len(CLASSES) * SIZE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    for column, split in enumerate(("train", "test")):
        clips = Clips(split, 1).batch(torch.arange(len(CLASSES)))
        rows = clips[:, _SHOWN].permute(0, 3, 1, 4, 2).reshape(len(CLASSES) * SIZE, width, 3)
        image.paste(Image.fromarray(rows.numpy()), (_MARGIN + column * (width + _GAP), 0))
    for at, name in enumerate(CLASSES):
        draw.multiline_text(
            (6, at * SIZE + SIZE // 2 - 14), name.replace(", ", ",\n"), fill="black", font=font
        )
    image.save(sys.argv[1], quality=85)


if __name__ == "__main__":
    main()

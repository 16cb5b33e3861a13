"""Draw a spectrogram."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .spectra import RATE

__all__ = ["draw"]

_LEFT, _TOP, _BELOW = 46, 26, 22


def draw(levels: np.ndarray, seconds: float, title: str, path: Path) -> None:
    """Write a PNG of log powers `[bins, frames]`, 0 to 8 kHz from below: their upper 80 decibels, bright is loud."""
    decibels = levels * (10 / np.log(10))
    grey = np.clip((decibels - decibels.max() + 80) / 80, 0, 1)
    plain = Image.fromarray((grey[::-1] * 255).astype(np.uint8)).resize(
        (2 * levels.shape[1], levels.shape[0] // 2)
    )
    picture = ImageOps.colorize(plain, "#0b0724", "#fff3b0", mid="#c1436d", midpoint=120)
    width, height = picture.size
    page = Image.new("RGB", (width + _LEFT + 12, height + _TOP + _BELOW), "white")
    page.paste(picture, (_LEFT, _TOP))
    pen = ImageDraw.Draw(page)
    pen.text((_LEFT, 6), title, fill="black")
    for kilohertz in range(0, RATE // 2000 + 1, 2):
        y = _TOP + height - round(height * kilohertz * 2000 / RATE)
        pen.line((_LEFT - 4, y, _LEFT, y), fill="black")
        pen.text((4, y - 6), f"{kilohertz} kHz", fill="black")
    for half in range(int(2 * seconds) + 1):
        x = _LEFT + round(width * half / 2 / seconds)
        pen.line((x, _TOP + height, x, _TOP + height + 4), fill="black")
        if half % 2 == 0:
            pen.text((x - 6, _TOP + height + 6), f"{half // 2} s", fill="black")
    page.save(path)

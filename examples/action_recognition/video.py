"""Frames of a file or a camera in, an annotated video out, by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from specqd.errors import InputError

__all__ = ["annotated", "read", "square", "writing"]


@contextmanager
def read(source: str) -> Iterator[tuple[Fraction, Iterator[np.ndarray]]]:
    """Open a video file, or the camera of that number; give its frames a second, and frames uint8 `[H, W, 3]`.

    Raises InputError if PyAV is missing, the source cannot be opened or holds no video, and among the frames if there
    are none, or what follows cannot be decoded.
    """
    av = _av()
    try:
        camera = source.isdigit()
        container = av.open(f"/dev/video{source}", format="v4l2") if camera else av.open(source)
    except (OSError, av.error.FFmpegError) as error:
        raise InputError(f"{source} cannot be read as a video: {error.strerror or error}") from error
    with container:
        if not container.streams.video:
            raise InputError(f"{source} holds no video; give a file that does, or the number of a camera")
        stream = container.streams.video[0]
        rate = stream.average_rate or Fraction(25)
        yield rate, _decoded(source, container.decode(stream))


def _decoded(source: str, frames: Iterator[Any]) -> Iterator[np.ndarray]:
    count = 0
    try:
        for count, frame in enumerate(frames, 1):  # noqa: B007
            yield frame.to_ndarray(format="rgb24")
    except _av().error.FFmpegError as error:
        raise InputError(f"{source} is damaged after {count} frames: {error.strerror or error}") from error
    if not count:
        raise InputError(f"{source} holds a video of no frames; record it again")


@contextmanager
def writing(path: Path, rate: Fraction) -> Iterator[Any]:
    """Open a video file to write; give what takes frames uint8 `[H, W, 3]`, all of one size, one by one.

    A file that is not finished is removed. Raises InputError if it cannot be written.
    """
    av, done = _av(), False
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate, options={"qscale": "3"})

            def write(pixels: np.ndarray) -> None:
                if not stream.codec_context.is_open:  # the codec wants even sizes
                    stream.height, stream.width = (size & ~1 for size in pixels.shape[:2])
                even = np.ascontiguousarray(pixels[: stream.height, : stream.width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

            yield write
            container.mux(stream.encode())
        done = True
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise InputError(
            f"{path} cannot be written as a video: {error}; give a path such as out.mp4"
        ) from error
    finally:
        if not done and path.is_file():
            path.unlink()


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return the middle square of a frame, resized: uint8 `[size, size, 3]`."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    image = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def annotated(pixels: np.ndarray, lines: list[str]) -> np.ndarray:
    """Return a frame with lines of text in its corner."""
    image = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(12, image.height // 22))
    text = "\n".join(lines)
    box = draw.multiline_textbbox((8, 8), text, font=font)
    draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), fill="black")
    draw.multiline_text((8, 8), text, fill="white", font=font)
    return np.asarray(image)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("videos are read by PyAV, which is not installed: pip install av") from error
    return av

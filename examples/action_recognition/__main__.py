"""Compile, test and show the Video Transformer Network: python -m examples.action_recognition --help."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import deque
from pathlib import Path

import torch

from specqd.errors import SpecqdError

from .compiled import PRECISIONS, compile_stream, examples_of_training
from .data import CLASSES, Clips
from .recognition import Recognition, predictions
from .variants import trained
from .video import annotated, read, writing

_VARIANTS = ("VTN", "VTN of differences", "two streams")


def main() -> None:
    """Run a command; what is wrong with its input is said in one sentence."""
    options = _options()
    try:
        options.run(options)
    except SpecqdError as error:
        sys.exit(f"error: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples.action_recognition", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for run in (compile_, test, demo):
        command = commands.add_parser(run.__name__.strip("_"), help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--variant", choices=_VARIANTS, default="two streams")
        if run is not test:
            command.add_argument("--precision", choices=list(PRECISIONS), default="int8")
        if run is compile_:
            command.add_argument("artifact", type=Path)
        if run is test:
            command.add_argument("--clips", type=int, default=1100)
        if run is demo:
            command.add_argument("video", help="a file, or the number of a camera")
            command.add_argument("-o", "--output", type=Path, default=Path("annotated.mp4"))
            command.add_argument("--artifact", type=Path, help="what `compile` made, to start at once")
            command.add_argument("--stride", type=int, default=2, help="recognise every so many frames")
            command.add_argument("--frames", type=int, default=0, help="stop after so many; 0: at the end")
    return parser.parse_args()


def compile_(options: argparse.Namespace) -> None:
    """Compile a trained variant into an artifact."""
    model = trained(options.variant)
    compile_stream(model, options.precision, examples_of_training(), options.artifact)


def test(options: argparse.Namespace) -> None:
    """Say how many clips of objects and textures that were not trained on each precision gets right."""
    labels = torch.arange(options.clips) % len(CLASSES)
    clips = torch.cat([*map(Clips("test", 2).batch, labels.split(110))])
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            artifact = Path(folder) / precision
            compile_stream(trained(options.variant), precision, examples_of_training(), artifact)
            right = torch.tensor(list(predictions(artifact, clips))) == labels
            size = (artifact / "weights.safetensors").stat().st_size / 1e6
        print(
            f"{options.variant}, {precision}: {100 * right.float().mean():.2f} % right, {size:.1f} MB",
            flush=True,
        )


def demo(options: argparse.Namespace) -> None:
    """Recognise a video and write it with labels and frames a second."""
    with tempfile.TemporaryDirectory() as folder, read(options.video) as (rate, frames):
        artifact = options.artifact or Path(folder) / "artifact"
        if options.artifact is None:
            print("compiling", flush=True)
            compile_stream(trained(options.variant), options.precision, examples_of_training(), artifact)
        recognition = Recognition(artifact, stride=options.stride)
        taken: deque[float] = deque(maxlen=25)
        with writing(options.output, rate) as write:
            for number, pixels in enumerate(frames, 1):
                found = recognition.feed(pixels)
                taken.append(found.seconds)
                speed = len(taken) / sum(taken)
                said = "looking" if found.label is None else f"{found.label}, {100 * found.probability:.0f} %"
                write(annotated(pixels, [said, f"{speed:.0f} frames/s"]))
                if number == options.frames:
                    break
    print(f"{number} frames, the last is {said}; {speed:.0f} frames/s recognised; wrote {options.output}")


if __name__ == "__main__":
    main()

"""`specqd synthesize-images`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specqd.cli.app import app
from specqd.cli.progress import progress_bar
from specqd.errors import InputError

__all__ = ["synthesize_images"]


@app.command("synthesize-images")
def synthesize_images(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Where the images go.", show_default=False),
    ],
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", help="How many.")] = 300,
    size: Annotated[int, typer.Option(metavar="N", help="Pixels a side.")] = 224,
    seed: Annotated[int, typer.Option(metavar="N", help="A seed gives the same images.")] = 0,
) -> None:
    """Make images of fractals to calibrate a network on, without data.

    DIR appears when it is complete, with 00000.png and so on.

    Example: specqd synthesize-images -n 300 -o fractals
    """
    from PIL import Image

    from specqd.passes.prune.fractals import fractals
    from specqd.staging import staged_directory

    if count < 1 or not 16 <= size <= 4096 or seed < 0:
        raise InputError("give 1 image or more, 16 to 4096 pixels a side, and a seed of 0 or more")
    with progress_bar() as tell, staged_directory(output) as folder:
        for number, image in enumerate(fractals(count, (size, size), seed)):
            tell("making images", number, count)
            Image.fromarray(image).save(folder / f"{number:05}.png")
    print(f"made {count} images of {size} x {size} pixels in {output}")

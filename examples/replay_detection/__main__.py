"""Score recordings: `python -m examples.replay_detection score FILE.wav`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import specqd
from specqd.errors import SpecqdError
from specqd.verified import cache_directory

from . import systems
from .audio import read
from .plot import draw
from .spectra import HOP, RATE

__all__ = ["app"]

app = typer.Typer(
    help="Replay-attack detection: raw audio to scores in one compiled artifact.", add_completion=False
)


@app.command("compile")
def compile_(output: Annotated[Path, typer.Option("--output", "-o", help="folder of the artifact")]) -> None:
    """Compile all systems and their fusion into one artifact."""
    _compile(output)


@app.command()
def score(
    files: Annotated[list[Path], typer.Argument(help="WAV files")],
    artifact: Annotated[
        Path | None, typer.Option(help="made by `compile`; else one is made and kept")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="folder for plots, else beside the files")] = None,
) -> None:
    """Print the score of each system and the fused one, and draw the spectrogram; above 0 is genuine."""
    run = specqd.load(artifact or _kept())
    for file in files:
        audio = read(file)
        scores, levels = run(audio.samples[None])
        table = Table("system", "score", "says", title=file.name)
        for name, value in zip((*systems.NAMES, "fused"), np.asarray(scores), strict=True):
            # Scores of single systems are not calibrated; what they say is their sign.
            table.add_row(name, f"{value:.3f}", "genuine" if value > 0 else "replayed")
        Console().print(table, *(f"note: {notice}" for notice in audio.notices), sep="\n")
        picture = (plot or file.parent) / f"{file.stem}.png"
        shown = np.asarray(levels)
        draw(shown, shown.shape[1] * HOP / RATE, file.name, picture)
        print(f"spectrogram: {picture}")


def _kept() -> Path:
    """Return the artifact of these weights and this source, compiled once."""
    made = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("*.py"), systems.WEIGHTS]):
        made.update(path.read_bytes())
    folder = cache_directory() / f"replay-detection-{made.hexdigest()[:12]}.specqd"
    if not folder.is_dir():
        print(f"compiling the systems into {folder}; this is done once", file=sys.stderr)
        _compile(folder)
    return folder


def _compile(folder: Path) -> None:
    # torch and the systems are only needed here.
    from .compiling import compile_audio

    compile_audio(systems.load(), folder)


if __name__ == "__main__":
    try:
        app()
    except SpecqdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""Genuine speech: the prompts of Asterisk, as Debian packages them, read at 16 kHz.

One voice reads the English and the Spanish prompts, so both go into the same part. The older `asterisk-prompt-*`
packages are of 8 kHz: half of the band that tells replayed speech is missing, so they are left out.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from specqd.errors import InputError
from specqd.staging import staged_directory

from .spectra import RATE

__all__ = ["VOICES", "fetch", "utterances"]

#: voice -> languages of its packages
VOICES = {"Allison": ("en", "es"), "Carlo": ("it",), "June": ("fr",), "Ivrvoice": ("ru",)}
#: seconds: shorter prompts are numbers and letters, of longer ones only the begin is used
SHORTEST, LONGEST = 1.2, 3.5


def fetch(folder: Path) -> None:
    """Download the packages with apt and unpack them, without installing, into `folder`/LANGUAGE.

    Raises InputError if apt or dpkg is not there, or fails.
    """
    for language in (language for languages in VOICES.values() for language in languages):
        if (folder / language).is_dir():
            continue
        name = f"asterisk-core-sounds-{language}-g722"
        with tempfile.TemporaryDirectory() as scratch, staged_directory(folder / language) as new:
            try:
                subprocess.run(["apt-get", "download", name], cwd=scratch, check=True)
                (package,) = Path(scratch).glob("*.deb")
                subprocess.run(["dpkg", "-x", str(package), str(new)], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise InputError(
                    f"the Debian package {name} cannot be fetched ({error}): run apt-get update first, or unpack it "
                    f"into {folder / language} yourself"
                ) from error


def utterances(folder: Path, voice: str) -> Iterator[tuple[str, np.ndarray]]:
    """Give the name of each prompt of a voice and its audio, float32 in [-1, 1], in order of names."""
    for language in VOICES[voice]:
        for path in sorted((folder / language).rglob("*.g722")):
            if path.stat().st_size >= SHORTEST * RATE / 2:  # four bits a sample
                audio = _decode(path)
                if np.abs(audio).max() > 0.05:  # some files are silence
                    yield f"{language}-{path.stem}", audio[: int(LONGEST * RATE)]


def _decode(path: Path) -> np.ndarray:
    import av

    with av.open(str(path), format="g722") as container:
        found = np.concatenate([frame.to_ndarray().ravel() for frame in container.decode(audio=0)])
    return found.astype(np.float32) / 32768

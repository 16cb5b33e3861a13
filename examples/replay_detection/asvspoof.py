"""The layout of the ASVspoof 2017 corpus: folders of WAV files, and a protocol of one line a trial for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specqd.errors import InputError

__all__ = ["PARTS", "Trial", "protocol", "read_trials"]

PARTS = {"train": "trn", "dev": "trl", "eval": "trl"}


@dataclass(frozen=True)
class Trial:
    """A recording; what is unknown of it is `-`."""

    path: Path
    genuine: bool
    speaker: str = "-"
    phrase: str = "-"
    environment: str = "-"
    playback: str = "-"
    recording: str = "-"

    def __str__(self) -> str:
        """Return its line of a protocol."""
        label = "genuine" if self.genuine else "spoof"
        rest = (self.speaker, self.phrase, self.environment, self.playback, self.recording)
        return " ".join([self.path.name, label, *rest])


def protocol(root: Path, part: str, version: str = "V2") -> tuple[Path, Path]:
    """Return the protocol of a part (train, dev, eval) and the folder of its recordings."""
    name = f"ASVspoof2017_{version}_{part}"
    return root / f"protocol_{version}" / f"{name}.{PARTS[part]}.txt", root / name


def read_trials(root: Path, part: str, version: str = "V2") -> list[Trial]:
    """Read the trials of a part.

    Raises:
        InputError: there is no protocol, a line of it is not understood, or a recording is missing.
    """
    listed, folder = protocol(root, part, version)
    if not listed.is_file():
        raise InputError(f"{listed} does not exist; {root} should hold ASVspoof 2017 as it is distributed")
    trials = []
    for number, line in enumerate(listed.read_text("utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) not in (2, 7) or words[1] not in ("genuine", "spoof"):
            raise InputError(
                f"{listed}, line {number}: {line!r} is not FILE genuine|spoof with 5 or no more words"
            )
        trial = Trial(folder / words[0], words[1] == "genuine", *words[2:])
        if not trial.path.is_file():
            raise InputError(f"{listed}, line {number}: there is no recording {trial.path}")
        trials.append(trial)
    if not trials:
        raise InputError(f"{listed} lists no trials")
    return trials

"""Prepare data: speech and rooms, which needs PyAV and pyroomacoustics, then trials in the layout of ASVspoof 2017.

    python -m examples.replay_detection.prepare DATA

Voices, languages, rooms and devices of a part occur in no other part. What comes out is simulated: no figure of it
can be compared with one of the ASVspoof challenges.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import wavfile

from . import asvspoof, speech
from .replay import World, genuine, replayed
from .rooms import Room, draw_room
from .spectra import RATE

__all__ = ["RECIPES", "Recipe", "materials", "simulate"]


@dataclass(frozen=True)
class Recipe:
    """What a part is made of: utterances of voices, recordings of each in either way, rooms, devices of a kind."""

    voices: tuple[str, ...]
    utterances: int
    repeats: int
    rooms: int
    devices: int
    seed: int


RECIPES = {
    "train": Recipe(("Allison", "Carlo"), 480, 6, 12, 48, 1),
    "dev": Recipe(("June",), 150, 3, 6, 8, 2),
    "eval": Recipe(("Ivrvoice",), 260, 3, 8, 10, 3),
}


def materials(folder: Path, part: str) -> None:
    """Write the speech and the responses of the rooms that a part is made of to `folder`/PART.npz."""
    recipe, rng = RECIPES[part], np.random.default_rng(RECIPES[part].seed)
    found = [u for voice in recipe.voices for u in speech.utterances(folder / "packages", voice)]
    chosen = sorted(rng.permutation(len(found))[: recipe.utterances])
    audio = [np.round(found[i][1] * 32768).astype(np.int16) for i in chosen]
    rooms = [draw_room(rng) for _ in range(recipe.rooms)]
    np.savez_compressed(
        folder / f"{part}.npz",
        audio=np.concatenate(audio),
        ends=np.cumsum([len(a) for a in audio]),
        names=[found[i][0] for i in chosen],
        **{kind: np.stack([room[kind] for room in rooms]).astype(np.float16) for kind in rooms[0]},
    )


def simulate(folder: Path, part: str, workers: int | None = None) -> None:
    """Record each utterance in both ways, several times, and write recordings and protocol under `folder`.

    A trial has a generator of its own, so the recordings do not depend on the number of processes.
    """
    recipe = RECIPES[part]
    with np.load(folder / f"{part}.npz") as kept:
        speeches = np.split(kept["audio"].astype(np.float32) / 32768, kept["ends"][:-1])
        names = kept["names"]
        rooms: list[Room] = [
            {"near": near.astype(np.float32), "far": far.astype(np.float32)}
            for near, far in zip(kept["near"], kept["far"], strict=True)
        ]
    world = World.draw(np.random.default_rng((recipe.seed, 0)), rooms, recipe.devices)
    listed, recordings = asvspoof.protocol(folder, part)
    listed.parent.mkdir(parents=True, exist_ok=True)
    recordings.mkdir(exist_ok=True)
    trials, jobs = [], []
    for i, (name, sound) in enumerate(zip(names, speeches, strict=True)):
        for k in range(2 * recipe.repeats):
            trial = asvspoof.Trial(
                recordings / f"{part[0].upper()}_{i:04}{k}.wav", k % 2 == 0, phrase=str(name)
            )
            trials.append(trial)
            jobs.append((trial, (recipe.seed, 1, i, k), world, sound))
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_record, jobs, chunksize=32))
    listed.write_text("".join(f"{trial}\n" for trial in trials), "utf-8")


def _record(job: tuple[asvspoof.Trial, tuple[int, ...], World, np.ndarray]) -> None:
    trial, seed, world, sound = job
    made = (genuine if trial.genuine else replayed)(np.random.default_rng(seed), world, sound)
    wavfile.write(trial.path, RATE, np.round(made * 32768).astype(np.int16))


def main() -> None:
    """Prepare all parts in the folder that is given."""
    parser = argparse.ArgumentParser(description="Prepare speech, rooms and simulated replays.")
    parser.add_argument("data", type=Path, help="folder to write to")
    folder = parser.parse_args().data
    speech.fetch(folder / "packages")
    for part in RECIPES:
        materials(folder, part)
        simulate(folder, part)


if __name__ == "__main__":
    main()

"""Impulse responses of rooms by the image source method (pyroomacoustics)."""

from __future__ import annotations

import numpy as np

from .spectra import RATE

__all__ = ["Room", "draw_room"]

#: samples of a response that are kept: 0.4 seconds
LENGTH = 6400

Room = dict[str, np.ndarray]
"""Responses float32 `[places, LENGTH]` of sources `near` (0.1 to 0.5 m) and `far` (0.3 to 2 m) from the microphone.

Direct sound begins at the first sample with the amplitude 1.
"""


def draw_room(rng: np.random.Generator, places: int = 12) -> Room:
    """Draw the size of a room (2.5 to 9 m), its reverberation time (0.15 to 0.7 s), and places in it."""
    import pyroomacoustics

    size = rng.uniform((2.5, 2.5, 2.3), (9.0, 6.0, 3.5))
    # A small room does not reverberate for long: no absorption below would do that.
    seconds = min(rng.uniform(0.15, 0.7), 0.08 * float(np.prod(size)) ** 0.5 + 0.15)
    absorption, order = pyroomacoustics.inverse_sabine(seconds, size)
    room: Room = {}
    for name, (least, most) in {"near": (0.1, 0.5), "far": (0.3, 2.0)}.items():
        found = []
        for _ in range(places):
            simulated = pyroomacoustics.ShoeBox(
                size, RATE, materials=pyroomacoustics.Material(absorption), max_order=min(order, 24)
            )
            microphone, source = _pair(rng, size, rng.uniform(least, most))
            simulated.add_source(source)
            simulated.add_microphone(microphone)
            simulated.compute_rir()
            found.append(_from_direct(simulated.rir[0][0]))
        room[name] = np.stack(found)
    return room


def _pair(rng: np.random.Generator, size: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw two points in a room, 20 cm from its walls at least, that are so far apart."""
    while True:
        microphone = rng.uniform(0.2, size - 0.2)
        direction = rng.normal(size=3)
        source = microphone + distance * direction / np.linalg.norm(direction)
        if np.all(source > 0.2) and np.all(source < size - 0.2):
            return microphone, source


def _from_direct(response: np.ndarray) -> np.ndarray:
    begin = int(np.argmax(np.abs(response)))
    # The simulated impulse is a windowed sinc: some samples lie before its peak.
    found = response[max(begin - 40, 0) :][:LENGTH] / np.abs(response[begin])
    return np.pad(found, (0, LENGTH - len(found))).astype(np.float32)

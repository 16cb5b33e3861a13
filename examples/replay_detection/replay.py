"""Simulated recordings of a talker, or of a loudspeaker that plays what was recorded of one, in rooms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import signal

from .rooms import Room
from .spectra import RATE

__all__ = ["Loudspeaker", "Microphone", "World", "genuine", "replayed"]


@dataclass(frozen=True)
class Microphone:
    """A band with resonances, and a noise floor in decibels below the speech."""

    band: np.ndarray
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Microphone:
        """Draw a telephone's or a headset's: from 40-150 Hz to 7.2 kHz or more, within some 3 dB."""
        band = [signal.butter(2, rng.uniform(40, 150), "highpass", fs=RATE, output="sos")]
        band += [_peak(rng, 2.0) for _ in range(3)]
        if rng.random() < 0.5:
            band.append(signal.butter(2, rng.uniform(7200, 7900), fs=RATE, output="sos"))
        return cls(np.concatenate(band), rng.uniform(35, 60))

    def record(self, rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
        """Return what is recorded of a sound, with a peak of 0.1 to 0.9, in steps of 16 bits."""
        heard = signal.sosfilt(self.band, sound)
        heard = heard + _noise(rng, len(heard), 0.0) * _level(heard) * 10 ** (-self.noise / 20)
        heard *= rng.uniform(0.1, 0.9) / np.abs(heard).max()
        return (np.round(heard * 32767) / 32768).astype(np.float32)


@dataclass(frozen=True)
class Loudspeaker:
    """A band with resonances behind a distortion of second and third order."""

    band: np.ndarray
    second: float
    third: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Loudspeaker:
        """Draw one of a telephone, a laptop, or a pair of monitors, the better the harder to tell."""
        kind = rng.choice(3)
        low = rng.uniform(*((300, 600), (120, 300), (40, 100))[kind])
        order, ripple = (2, 2, 2)[kind], (5.0, 3.5, 2.0)[kind]
        band = [signal.butter(order, low, "highpass", fs=RATE, output="sos")]
        band += [_peak(rng, ripple) for _ in range(5)]
        band.append(
            signal.butter(
                2, rng.uniform(*((5500, 7500), (6500, 7800), (7400, 7900))[kind]), fs=RATE, output="sos"
            )
        )
        most = (0.15, 0.08, 0.02)[kind]
        return cls(np.concatenate(band), rng.uniform(0, most), rng.uniform(0, most))

    def play(self, sound: np.ndarray) -> np.ndarray:
        """Return what is heard of a recording."""
        x = sound / np.abs(sound).max()
        bent = x + self.second * x**2 - self.third * x**3
        return signal.sosfilt(self.band, bent - bent.mean())


@dataclass(frozen=True)
class World:
    """The rooms and devices of one part of the data."""

    rooms: list[Room]
    microphones: list[Microphone]
    loudspeakers: list[Loudspeaker]
    attackers: list[Microphone]

    @classmethod
    def draw(cls, rng: np.random.Generator, rooms: list[Room], devices: int) -> World:
        """Draw as many microphones, loudspeakers and microphones of attackers."""
        return cls(
            rooms,
            [Microphone.draw(rng) for _ in range(devices)],
            [Loudspeaker.draw(rng) for _ in range(devices)],
            [Microphone.draw(rng) for _ in range(devices)],
        )


def genuine(rng: np.random.Generator, world: World, speech: np.ndarray) -> np.ndarray:
    """Record a talker near a microphone of the world."""
    return _record(rng, _pick(rng, world.microphones), _pick(rng, world.rooms)["near"], speech, (20, 45))


def replayed(rng: np.random.Generator, world: World, speech: np.ndarray) -> np.ndarray:
    """Record a talker as an attacker would, play that, and record it as the genuine are recorded."""
    taken = _record(rng, _pick(rng, world.attackers), _pick(rng, world.rooms)["near"], speech, (25, 50))
    heard = _pick(rng, world.loudspeakers).play(taken)
    place = _pick(rng, world.rooms)["near" if rng.random() < 0.5 else "far"]
    return _record(rng, _pick(rng, world.microphones), place, heard, (20, 45))


def _record(
    rng: np.random.Generator,
    microphone: Microphone,
    places: np.ndarray,
    sound: np.ndarray,
    ratios: tuple[float, float],
) -> np.ndarray:
    """Record a sound in a room whose noise is so many decibels below it."""
    heard = signal.fftconvolve(sound, _pick(rng, places))[: len(sound)]
    noise = _noise(rng, len(heard), rng.uniform(0.5, 1.5))
    return microphone.record(rng, heard + noise * _level(heard) * 10 ** (-rng.uniform(*ratios) / 20))


def _pick(rng: np.random.Generator, choices: list | np.ndarray) -> object:
    return choices[rng.integers(len(choices))]


def _level(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _noise(rng: np.random.Generator, length: int, slope: float) -> np.ndarray:
    """Draw noise of the level 1 whose power falls with that power of the frequency: 0 is white, 1 is pink."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    hertz = np.maximum(np.fft.rfftfreq(length, 1 / RATE), 20.0)
    noise = np.fft.irfft(spectrum * hertz ** (-slope / 2), length)
    return noise / _level(noise)


def _peak(rng: np.random.Generator, decibels: float) -> np.ndarray:
    """Draw a resonance, or its opposite, of a normal number of decibels: the peaking filter of R. Bristow-Johnson."""
    gain = 10 ** (rng.normal(0, decibels) / 40)
    omega = 2 * np.pi * np.exp(rng.uniform(np.log(150), np.log(7000))) / RATE
    alpha = np.sin(omega) / (2 * np.exp(rng.uniform(np.log(0.7), np.log(5))))
    b = np.array([1 + alpha * gain, -2 * np.cos(omega), 1 - alpha * gain])
    a = np.array([1 + alpha / gain, -2 * np.cos(omega), 1 - alpha / gain])
    return np.concatenate([b, a])[None] / a[0]

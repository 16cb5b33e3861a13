"""Read a WAV file of any kind as mono audio at 16 kHz, or say why it cannot be scored."""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import signal
from scipy.io import wavfile

from specqd.errors import InputError

from .spectra import RATE

__all__ = ["Audio", "read"]

#: seconds that a recording has at least
LEAST = 0.25
#: the share of samples at full scale beyond which a recording counts as clipped
CLIPPED = 1e-3


@dataclass(frozen=True)
class Audio:
    """Samples float32 `[time]` in [-1, 1] at 16 kHz, and what was done to get them."""

    samples: np.ndarray
    notices: tuple[str, ...] = ()


def read(path: Path) -> Audio:
    """Read a WAV file: several channels are mixed, another rate is resampled, clipping is noticed.

    Raises:
        InputError: there is no such file, it is no WAV file, it is damaged, or what it holds is no recording of speech.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty (0 bytes); record it again")
    rate, data = _decoded(path)
    x = _scaled(path, data)
    notices = []
    if x.ndim > 1:
        notices.append(f"{x.shape[1]} channels were mixed into one")
        x = x.mean(1)
    _demand_sound(path, rate, x)
    clipped = float(np.mean(np.abs(x) >= 0.999))
    if clipped > CLIPPED:
        notices.append(
            f"clipped: {clipped:.1%} of the samples are at full scale, which scores may take for a replay"
        )
    if rate != RATE:
        notices.append(f"resampled from {rate} Hz to {RATE} Hz")
        if rate < RATE:
            notices.append(f"nothing above {rate // 2} Hz was recorded, where replays show best")
        by = math.gcd(rate, RATE)
        x = signal.resample_poly(x, RATE // by, rate // by)
    return Audio(np.ascontiguousarray(x, np.float32), tuple(notices))


def _demand_sound(path: Path, rate: int, x: np.ndarray) -> None:
    """Refuse what is no recording of something."""
    if not len(x):
        raise InputError(f"{path} has a header and no samples; record it again")
    if not np.isfinite(x).all():
        raise InputError(
            f"{path}: {np.count_nonzero(~np.isfinite(x))} samples are NaN or infinite; decode it again"
        )
    if not 4000 <= rate <= 384_000:
        raise InputError(f"{path} has {rate} samples a second; give a recording of 4 to 384 kHz")
    if len(x) < LEAST * rate:
        count = "1 sample" if len(x) == 1 else f"{len(x)} samples"
        raise InputError(f"{path} holds {count} ({len(x) / rate:.3f} s); scores need {LEAST} s at least")
    if np.ptp(x) < 1e-6:
        raise InputError(f"{path} is silent: all samples are alike")


def _decoded(path: Path) -> tuple[int, np.ndarray]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that say nothing of the sound
            rate, data = wavfile.read(path)
    except (
        ValueError,
        EOFError,
        OSError,
        OverflowError,
        MemoryError,
        ZeroDivisionError,
        struct.error,
        TypeError,
    ) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"{path} is not a WAV file that can be read ({lines[0]}); convert it to 16-bit PCM"
        ) from error
    return rate, data


def _scaled(path: Path, data: np.ndarray) -> np.ndarray:
    """Bring integers to [-1, 1); bytes are unsigned in WAV files."""
    if data.dtype == np.uint8:
        return (data.astype(np.float64) - 128) / 128
    if np.issubdtype(data.dtype, np.signedinteger):
        return data.astype(np.float64) / -float(np.iinfo(data.dtype).min)
    x = data.astype(np.float64)
    peak = np.abs(x[np.isfinite(x)]).max(initial=0.0)
    if peak > 64:
        raise InputError(f"{path}: floats reach {peak:.3g}, and full scale is 1; scale them")
    return x

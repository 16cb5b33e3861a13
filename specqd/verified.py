"""Remembers which large files have been hashed, so that an unchanged artifact is not read whole again.

A stamp is an empty file named by a hash of the file's path, device, inode, size, times and SHA-256. Any
write to the file, also one that keeps its size, changes its change time, and thereby leaves it no stamp.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

__all__ = ["cache_directory", "remember", "stamp"]

_SMALL = 1 << 20  # bytes; hashing this takes about a millisecond, so it is simply done
_KEPT = 180 * 86400.0  # seconds
# File times tick coarsely: a file younger than this could change again within the same tick.
_SETTLED_NS = 2_000_000_000


def cache_directory() -> Path:
    """Where specqd keeps what it can make again: $SPECQD_CACHE, else specqd/ in the user's cache folder."""
    if chosen := os.environ.get("SPECQD_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "specqd"


def stamp(path: Path, sha256: str) -> Path | None:
    """Name the stamp that says "this very file has this hash"; None for a file that cannot have one.

    Take it before hashing and leave it after: a change in between leaves a stamp that fits no file.
    """
    status = path.stat()
    if status.st_size <= _SMALL or time.time_ns() - status.st_ctime_ns < _SETTLED_NS:
        return None
    facts = (
        path.resolve(),
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return cache_directory() / "verified" / hashlib.sha256(repr((facts, sha256)).encode()).hexdigest()


def remember(record: Path) -> None:
    """Leave a stamp, and drop those of half a year ago; does nothing where the cache cannot be written."""
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.touch()
        oldest = time.time() - _KEPT
        for other in record.parent.iterdir():
            if other.stat().st_mtime < oldest:
                other.unlink()

"""Files of a cache that end with the SHA-256 of what stands before it: a damaged one is as good as none."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from specqd.staging import write_whole

__all__ = ["read_checked", "write_checked"]

_DIGEST = 32  # bytes


def read_checked(path: Path) -> bytes | None:
    """Return what `write_checked` was given; None if the file is not there, not whole, or cannot be read."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    content, digest = whole[:-_DIGEST], whole[-_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def write_checked(path: Path, content: bytes) -> None:
    """Keep `content` with its digest; does nothing where that cannot be written."""
    with contextlib.suppress(OSError):
        write_whole(path, content + hashlib.sha256(content).digest())

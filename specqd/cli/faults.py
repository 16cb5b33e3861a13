"""What went wrong, in the words that the command line prints."""

from __future__ import annotations

import errno

from specqd.errors import SpecqdError

__all__ = ["sentence"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_MEMORY = "there is not enough memory: end what else runs, or take a smaller model or `--context`"


def sentence(error: Exception) -> str | None:
    """Say what was met, where and what to do; None for an error that only a fault in specqd can raise."""
    if isinstance(error, SpecqdError):
        return str(error)
    if isinstance(error, MemoryError):
        return _NO_MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error)
    return None


def _of_the_system(error: OSError) -> str:
    if error.errno == errno.ENOMEM:
        return _NO_MEMORY
    where = error.filename2 or error.filename
    if error.errno in _FULL:
        place = f"the disk of {where}" if where else "the disk of the output or of temporary files"
        return f"no space left on {place}: make room and try again"
    reason = error.strerror or "no reason given"
    return f"cannot use {where or 'a file'} ({reason}): check that path, its permissions and its disk"

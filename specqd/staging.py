"""Directories and files that appear under their final name whole, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from specqd.errors import InputError

__all__ = ["clean_abandoned", "demand_free", "staged_directory", "write_whole"]

_MARK = ".specqd-part-"
_LONGEST = 255 - len(f".{_MARK}01234567-old")  # bytes of a name that leave room for those of its parts
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, in place of what was there; its folder is made if it is missing.

    Raises:
        OSError: it cannot be written, such as on a full disk; what was there is still there, and nothing else is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_directory(target: Path, *, replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a new empty directory beside `target`; when the block ends well, it becomes `target`.

    When the block raises, the new directory is removed and `target` is as it was. What a killed process left
    behind is removed by the next call for the same target. An existing `target` is kept until its successor
    is complete and on disk; it is replaced only if it is empty or `replaceable(target)`.

    Raises:
        InputError: as `demand_free` says.
    """
    target = target.resolve()
    demand_free(target, replaceable)
    with _parents(target):
        clean_abandoned(target)
        part, lock = _new_part(target)
        try:
            yield part
            _sync_tree(part)
            demand_free(target, replaceable)
            _move_into_place(part, target)
        finally:
            os.close(lock)
            # After an exchange, `part` names what `target` was before.
            shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the folders above `target` that are missing, and remove them if nothing comes into them."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


def clean_abandoned(target: Path) -> None:
    """Remove what killed processes left beside `target`; a part whose maker lives is locked and stays."""
    target = target.resolve()
    for part in target.parent.glob(f".{glob.escape(target.name)}{_MARK}*"):
        with contextlib.suppress(OSError):
            lock = _lock(part)
            try:
                shutil.rmtree(part, ignore_errors=True)
            finally:
                os.close(lock)


def demand_free(target: Path, replaceable: Callable[[Path], bool] | None = None) -> None:
    """Check that a staged directory may become `target`, before work is spent on it.

    Raises:
        InputError: `target` exists and may not be replaced, or cannot be made where it is.
    """
    _demand_place(target.resolve())
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target} exists and is not a directory: choose another output directory")
    if any(target.iterdir()) and not (replaceable and replaceable(target)):
        raise InputError(f"{target} exists and is not empty: remove it or choose another output directory")


def _demand_place(target: Path) -> None:
    if len(os.fsencode(target.name)) > _LONGEST:
        raise InputError(f"the name of the output directory is longer than {_LONGEST} bytes: shorten it")
    if os.path.ismount(target):
        raise InputError(f"{target} is a mount point, which cannot be replaced: give a folder inside it")
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory, so that {target} cannot be made: choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{parent} cannot be written to, so that {target} cannot be made: choose another output directory"
        )


def _lock(directory: Path) -> int:
    """Lock a directory without waiting; the lock lives as long as the descriptor, thus as the process."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _new_part(target: Path) -> tuple[Path, int]:
    while True:
        part = target.parent / f".{target.name}{_MARK}{secrets.token_hex(4)}"
        part.mkdir()
        # Another build may take the unlocked directory for an abandoned one and remove it: then try again.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(part)
            if part.is_dir():
                return part, lock
            os.close(lock)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for path in (*(os.path.join(folder, name) for name in files), folder):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _move_into_place(part: Path, target: Path) -> None:
    try:
        os.rename(part, target)  # also replaces an empty directory
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        _exchange(part, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(part: Path, target: Path) -> None:
    """Swap two directories, in one step where the kernel and file system can (Linux, renameat2)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = (os.fsencode(part), os.fsencode(target))
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    aside = part.with_name(part.name + "-old")
    os.rename(target, aside)
    try:
        os.rename(part, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, part)

"""Loads compiled code with TVM's runtime alone: neither `import tvm` nor torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from specqd.errors import ArtifactError, InputError
from specqd.weightfile import ALIGNMENT

__all__ = ["aligned", "from_dlpack", "load_functions", "set_threads", "tensor"]

_kept: list[ctypes.CDLL] = []
_loaded: dict[str, tuple[int, int, int]] = {}


def load_functions(library: Path, threads: int) -> Callable[[str], Callable[..., None]]:
    """Load `lib.so` and return what looks a function up by symbol.

    `threads` is the most that the thread pool can use; the first call in a process settles it.

    Raises:
        InputError: this machine has fewer CPUs than `threads`: threads that wait for each other at barriers
            while they share a CPU are slower than one by orders of magnitude.
        ArtifactError: the library cannot be loaded, or (when looking up) lacks the symbol.
    """
    cpus = os.cpu_count() or threads
    if threads > cpus:
        raise InputError(
            f"cannot run on {threads} threads: this machine has {cpus} CPUs; ask for at most those"
        )
    # Threads that are pinned to cores cannot get out of the way of other processes.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    ffi = _ffi()
    try:
        if not _kept:
            _kept.append(ctypes.CDLL(str(_runtime_library()), ctypes.RTLD_GLOBAL))
        module = _load(ffi, library)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ArtifactError(f"cannot load {library} ({reason}): compile it again on this system") from error

    def find(symbol: str) -> Callable[..., None]:
        try:
            return module[symbol]
        except AttributeError as error:
            raise ArtifactError(f"{library} has no function {symbol!r}: compile it again") from error

    return find


def _load(ffi: ModuleType, library: Path) -> Any:
    """Load a library; the system would take one that replaced another at the same path for that one."""
    status = library.stat()
    identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
    if _loaded.setdefault(str(library), identity) == identity:
        return ffi.load_module(str(library))
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "lib.so"
        link.symlink_to(library.resolve())
        return ffi.load_module(str(link))


def set_threads(count: int) -> None:
    """Let the next calls use `count` threads (at most what `load_functions` was told); takes under 1 us."""
    _config_threadpool()(1, count)


def tensor(array: Any) -> Any:
    """Wrap a writable, contiguous, aligned numpy array for compiled functions, sharing its memory.

    Compiled code loads whole aligned vectors, so an array that is not aligned raises RuntimeError here.
    """
    return _ffi().from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)


def from_dlpack(value: Any) -> Any:
    """Wrap whatever speaks DLPack, however it lies in memory."""
    return _ffi().from_dlpack(value)


def aligned(nbytes: int) -> np.ndarray:
    """Return zeroed bytes that start at a page; a page takes memory when it is first written.

    Raises:
        ArtifactError: the system does not give that much memory.
    """
    try:
        memory = mmap.mmap(-1, max(nbytes, 1))
    except (OSError, OverflowError) as error:
        raise ArtifactError(
            f"the system does not give the {nbytes / 1e6:.0f} MB of memory that a buffer of the artifact takes: "
            "end what else runs, or compile with a smaller `--context`"
        ) from error
    # In huge pages a cache would take all its memory at once: its first slots are far apart.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def _config_threadpool() -> Callable[[int, int], None]:
    global _configure
    if _configure is None:
        _configure = _ffi().get_global_func("runtime.config_threadpool")
    return _configure


_configure: Callable[[int, int], None] | None = None


def _ffi() -> ModuleType:
    """Import tvm_ffi without torch, which it would import wherever torch is installed (and take seconds).

    It has no switch for that, but takes a failing import for an answer; `None` makes an import fail.
    """
    if "tvm_ffi" in sys.modules:
        return sys.modules["tvm_ffi"]
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    except ImportError as error:
        raise ArtifactError("apache-tvm-ffi is not installed: `pip install apache-tvm`") from error
    finally:
        if absent:
            del sys.modules["torch"]
    return tvm_ffi


def _runtime_library() -> Path:
    # find_spec locates the package without importing it.
    spec = importlib.util.find_spec("tvm")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        found = Path(folder) / "lib" / "libtvm_runtime.so"
        if found.is_file():
            return found
    raise ArtifactError("TVM's runtime library is not installed: `pip install apache-tvm`")

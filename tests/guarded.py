"""Runs an artifact on arrays that end where memory does, in a process of its own: to read beyond one ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

__all__ = ["run_guarded"]

_SCRIPT = """if True:
    import ctypes, mmap, sys
    import numpy as np, specqd
    given = []
    for array in np.load(sys.argv[2]).values():
        size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + size), mmap.PAGESIZE, 0) == 0
        given.append(np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape))
        given[-1][...] = array
    np.save(sys.argv[3], specqd.load(sys.argv[1])(*given))
"""


def run_guarded(artifact: Path, *inputs: Tensor) -> np.ndarray:
    """Return the one output of an artifact.

    Inputs are whole cache lines: the runtime copies others to where a line begins, and there may be something behind.
    """
    assert all(tensor.nbytes % 64 == 0 for tensor in inputs)
    given, found = (artifact.with_name(f"{artifact.name}.{end}") for end in ("npz", "npy"))
    np.savez(given, *(tensor.numpy() for tensor in inputs))
    done = subprocess.run([sys.executable, "-c", _SCRIPT, artifact, given, found], stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()[-2000:] or f"ended by signal {-done.returncode}"
    return np.load(found)

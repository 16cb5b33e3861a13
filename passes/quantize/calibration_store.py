"""Keeps what calibration has made in the cache folder, so that one that was broken off goes on where it was.

A store is a folder named by a hash of all that its content depends on; a file in it is whole or not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from specqd.digest import digest
from specqd.program import Program
from specqd.staging import write_whole
from specqd.verified import cache_directory

__all__ = ["Store", "fingerprint"]

_KEPT = 30 * 86400.0  # seconds


@dataclass(frozen=True)
class Store:
    """Named sets of tensors in a folder, which is made when the first is put there."""

    folder: Path

    @classmethod
    def of(cls, *content: object, code: Path = Path(__file__).parent) -> Store:
        """Return the store of what depends on `content` (of plain values) and on the code in a folder."""
        made_of = hashlib.sha256(repr(content).encode())
        for source in sorted(code.glob("*.py")):
            made_of.update(source.read_bytes())
        return cls(cache_directory() / "calibration" / made_of.hexdigest())

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors put under a name; None if there are none that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self._file(name).read_bytes())
        except (OSError, SafetensorError):
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name; does nothing where the folder cannot be written."""
        from safetensors.torch import save

        with contextlib.suppress(OSError):
            if not self.folder.is_dir():
                self._forget_old()
            write_whole(self._file(name), save(dict(tensors)))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _forget_old(self) -> None:
        """Remove the stores of a month ago."""
        for other in self.folder.parent.glob("*"):
            if other.stat().st_mtime < time.time() - _KEPT:
                shutil.rmtree(other, ignore_errors=True)


def fingerprint(program: Program, entry: str) -> str:
    """Hash what an entry computes: its graph, and name, type, shape and bytes of its weights."""
    made_of = hashlib.sha256(str(program.entries[entry].graph).encode())
    for name in program.used_weights(entry):
        made_of.update(f"{name} {digest(program.weights[name])}".encode())
    return made_of.hexdigest()

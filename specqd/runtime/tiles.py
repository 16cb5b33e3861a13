"""Leave to use the tiles of AMX, for which Linux wants to be asked once a process."""

from __future__ import annotations

import ctypes

from specqd.errors import ArtifactError

__all__ = ["permit_tiles"]

_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # x86-64; see Documentation/arch/x86/xstate.rst


def permit_tiles() -> None:
    """Ask for the tiles' registers, for all threads of the process; x86-64 Linux only.

    Raises:
        ArtifactError: the system does not give them.
    """
    system = ctypes.CDLL(None, use_errno=True)
    if system.syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA):
        raise ArtifactError(
            "this system does not let processes use the tiles of AMX: compile with `--isa avx512_bf16`"
        )

"""What the CPU can do, read without running a single instruction that it may lack."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

from specqd.errors import ArtifactError

__all__ = ["cpu_features", "cpu_name", "demand_cpu"]

# LLVM's name -> the kernel's, where they differ by more than punctuation.
_KERNEL_NAMES = {
    "lzcnt": "abm", "pclmul": "pclmulqdq", "prfchw": "3dnowprefetch", "rdrnd": "rdrand", "sahf": "lahflm",
    "sha": "shani", "sse3": "pni", "neon": "asimd", "dotprod": "asimddp", "fullfp16": "asimdhp",
}  # fmt: skip
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature names of the first CPU as the Linux kernel writes them; empty where there is no such file."""
    return frozenset(_field(cpuinfo, {"flags", "features"}).split())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Describe the CPU in the words of its maker, or at least its architecture."""
    return _field(cpuinfo, {"model name"}) or platform.machine()


def demand_cpu(triple: str, required: Iterable[str], cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Refuse code that this CPU cannot run, before any of it runs.

    `triple` is LLVM's; `required` holds feature names as LLVM or the Linux kernel write them.

    Raises:
        ArtifactError: another architecture, or features that this CPU lacks or that cannot be found out.
    """
    wanted, here = _architecture(triple.partition("-")[0]), _architecture(platform.machine())
    if wanted != here:
        raise ArtifactError(f"the artifact was compiled for {wanted} and this CPU is {here}: compile it here")
    present = set(map(_plain, cpu_features(cpuinfo)))
    missing = [name for name in required if not {_plain(name), _KERNEL_NAMES.get(_plain(name))} & present]
    if missing and not present:
        raise ArtifactError(
            f"the artifact needs {', '.join(missing)}, and this system does not say what its CPU has: "
            f"compile it with `--isa generic`"
        )
    if missing:
        raise ArtifactError(
            f"the artifact was compiled for a CPU with {', '.join(missing)}, which this one "
            f"({cpu_name(cpuinfo)}) lacks: compile it here, or with `--isa generic`"
        )


def _architecture(name: str) -> str:
    name = name.lower()
    return _MACHINES.get(name, name)


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def _field(cpuinfo: Path, names: set[str]) -> str:
    try:
        with cpuinfo.open() as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip().lower() in names:
                    return value.strip()
    except OSError:
        pass
    return ""

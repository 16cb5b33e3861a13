"""What only a fresh process shows: the time to load an artifact, and the most memory that answering takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from specqd.errors import ArtifactError

__all__ = ["load_seconds", "peak_rss_mb"]

_LOAD = """
import sys, time
began = time.perf_counter()
import specqd.runtime.model
specqd.runtime.model.load(sys.argv[1])
print(time.perf_counter() - began)
"""

# VmHWM, because the maximum that getrusage reports begins with that of the process it was forked from.
_ANSWER = """
import sys
from specqd.cli import main
try:
    main(["generate", sys.argv[1], "--prompt", sys.argv[2], "--max-new-tokens", sys.argv[3]])
except SystemExit as end:
    if end.code:
        raise
with open("/proc/self/status") as lines:
    print([line.split()[1] for line in lines if line.startswith("VmHWM")][0])
"""


def load_seconds(directory: Path) -> float:
    """Seconds from the first import to a loaded artifact, in a process of its own."""
    return float(_run(_LOAD, str(directory)))


def peak_rss_mb(directory: Path, prompt: str, new_tokens: int) -> float:
    """Peak resident memory of `specqd generate`, in MB of 10^6 bytes."""
    return float(_run(_ANSWER, str(directory), prompt, str(new_tokens))) * 1024 / 1e6


def _run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ArtifactError(
            f"{arguments[0]} does not run in a fresh process: {said[-1].removeprefix('error: ')}"
        )
    return done.stdout.splitlines()[-1]

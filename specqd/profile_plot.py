"""The picture of `specqd profile --plot`; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from specqd.errors import InputError
from specqd.profile import Profile

__all__ = ["draw"]

_MOST = 25  # bars


def draw(found: Profile, file: Path) -> None:
    """Draw a bar a row, as long as its time, and what of the peak and of the memory's rate it gets beside it.

    Raises InputError if matplotlib is not installed, or does not know the kind of file.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError("a plot needs matplotlib: `pip install specqd[bench]`") from error
    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = found.rows[:_MOST]
    figure, (times, parts) = plt.subplots(
        1, 2, sharey=True, figsize=(10, 1.2 + 0.28 * len(rows)), width_ratios=(3, 2), layout="constrained"
    )
    at = range(len(rows))
    times.barh(at, [row.seconds * 1e3 for row in rows], color="#4878a8")
    times.set_yticks(at, [f"{row.name}  {row.module}".rstrip() for row in rows], fontsize=8)
    times.invert_yaxis()
    times.set_xlabel("ms in a run")
    height = 0.4
    peak = [100 * (row.gflops or 0) / found.peaks.gflops for row in rows]
    memory = [100 * row.gbps / found.peaks.gbps for row in rows]
    parts.barh([y - height / 2 for y in at], peak, height, label="of peak FLOP/s", color="#c8553d")
    parts.barh([y + height / 2 for y in at], memory, height, label="of memory bandwidth", color="#8fb8a2")
    parts.axvline(100, color="gray", linewidth=0.8)
    parts.set_xlabel("%")
    parts.legend(fontsize=8)
    left = len(found.rows) - len(rows)
    figure.suptitle(
        f"{found.cpu}, {found.isa}" + (f"; {left} shorter ones are left out" if left else ""), fontsize=9
    )
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise InputError(f"cannot draw {file}: {error}") from error
    finally:
        plt.close(figure)

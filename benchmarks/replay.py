"""Replay detection from raw audio to score, in turns with eager torch, inductor, onnxruntime and OpenVINO.

Time is that for a second of audio: a real-time factor of 0.02 is 20 ms. The systems are those of
examples/replay_detection with their weights; each looks at 3.35 seconds. How engines are run, `models.py` says.

    python benchmarks/replay.py
    python benchmarks/replay.py --quick --json replay.json
"""

from __future__ import annotations

from collections.abc import Sequence

import models
import report
from model_zoo import AUDIO, SECONDS

_ENGINES = {
    "specqd": "specqd",
    "eager": "eager",
    "inductor": "inductor",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
}


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = models.read_options("Measure replay detection against other engines.", list(AUDIO), ["LCNN"])
    # Eager torch's Fourier transforms have no BF16.
    options.precisions = [precision for precision in options.precisions if precision != "bf16"]
    rows, details = models.measured(options)
    details = {"model": "replay detection, raw audio to score", **details}
    report.write("replay", [_table(rows)], details, rows, options)


def _table(rows: Sequence[models.Row]) -> report.Table:
    lines, figures = [], {}
    for row in rows:
        name = f"{row['model']} {row['precision']}"
        taken = [row.get(f"{engine}_ms") for engine in _ENGINES]
        lines.append(
            [name, *("" if ms is None else f"{ms / SECONDS:.2f}" for ms in taken), f"{row['error']:.1e}"]
        )
        figures[name] = {"real_time_factor": row["specqd_ms"] / SECONDS / 1e3}
    headings = ["ms a second of audio", *_ENGINES.values(), "off float32 by"]
    return report.Table("Raw audio to score:", headings, lines, figures)


if __name__ == "__main__":
    main()

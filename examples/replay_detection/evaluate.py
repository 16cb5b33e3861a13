"""Error rates on dev and eval of each system, their fusion, and the LCNN in INT8 and with half of its weights.

python -m examples.replay_detection.evaluate DATA [--json FILE] [--every N]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specqd.passes import Pipeline
from specqd.passes.prune.calibrate import Calibrate
from specqd.passes.prune.calibration_data import Data
from specqd.passes.quantize.quantize_int8 import QuantizeINT8

from . import systems
from .asvspoof import Trial, read_trials
from .compiling import compile_audio
from .detector import Detector, read_pcm
from .metrics import bootstrap, eer, min_tdcf
from .spectra import fit

__all__ = ["VARIANTS", "variant"]

VARIANTS = ("float32", "int8", "50 % pruned", "50 % pruned, int8")


def variant(name: str, calibration: Tensor) -> Pipeline:
    """Return the passes of a variant of the LCNN; `calibration` is audio `[recordings, time]`."""
    data = Data.of(calibration)
    pruned = ("sparsify{sparsity=0.5}", Calibrate(data=data)) if "pruned" in name else ()
    rounded = (QuantizeINT8(data=data),) if "int8" in name else ()
    return Pipeline.of(*pruned, *rounded)


def figures(trials: Sequence[Trial], scores: np.ndarray) -> dict[str, float]:
    """Return error rates in percent, and the normalised cost, of one system's scores `[trials]`."""
    genuine = np.array([trial.genuine for trial in trials])
    kinds = scores[genuine], scores[~genuine]
    phrases = [[t.phrase for t in trials if t.genuine is kind] for kind in (True, False)]
    low, high = bootstrap(*kinds, phrases)
    found = {"eer": eer(*kinds), "low": low, "high": high}
    return {key: round(100 * value, 2) for key, value in found.items()} | {
        "min_tdcf": round(min_tdcf(*kinds), 3)
    }


def measure(data: Path, every: int) -> Iterator[dict[str, Any]]:
    """Give the figures of each part and system."""
    trained = systems.load()
    trials = {part: read_trials(data, part)[::every] for part in ("dev", "eval")}
    audio = {part: read_pcm(trial.path for trial in of) for part, of in trials.items()}
    with tempfile.TemporaryDirectory() as scratch:
        run = compile_audio(trained, Path(scratch) / "systems")
        for part, recordings in audio.items():
            scores = np.stack([run(x)[0] for x in recordings])
            for at, name in enumerate((*systems.NAMES, "fused")):
                yield {"part": part, "system": name, **figures(trials[part], scores[:, at])}
        detector = Detector(trained.fourier, trained.lcnn)
        some = read_pcm(trial.path for trial in read_trials(data, "train")[::47])
        calibration = torch.stack([fit(x, trained.fourier.samples) for x in some])
        for name in VARIANTS:
            run = compile_audio(detector, Path(scratch) / "lcnn", passes=variant(name, calibration))
            for part, recordings in audio.items():
                scores = np.array([run(x) for x in recordings])
                yield {"part": part, "system": f"lcnn, {name}", **figures(trials[part], scores)}


def main() -> None:
    """Print a line a figure, then a table; write JSON."""
    parser = argparse.ArgumentParser(description="Measure the errors of replay detection.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--every", type=int, default=1, help="score every so many trials only")
    options = parser.parse_args()
    rows = []
    for row in measure(options.data, options.every):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print("| system | dev EER % | eval EER % | eval min t-DCF |\n| --- | ---: | ---: | ---: |")
    for name in dict.fromkeys(row["system"] for row in rows):
        dev, test = (
            next(r for r in rows if (r["part"], r["system"]) == (part, name)) for part in ("dev", "eval")
        )
        cells = [f"{r['eer']:.1f} ({r['low']:.1f}-{r['high']:.1f})" for r in (dev, test)]
        print(f"| {name} | {' | '.join(cells)} | {test['min_tdcf']:.3f} |")


if __name__ == "__main__":
    main()

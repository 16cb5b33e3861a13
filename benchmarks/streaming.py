"""Frames a second of the Video Transformer Network with its ResNet-34 encoder, in turns with other engines.

The stream takes a frame of 224 x 224 at a time and keeps the embeddings of the 15 before it (`stream-frames`); all
engines run that same graph, with what is kept going in and out. INT8 peers read the pairs of QuantizeLinear and
DequantizeLinear that quantize-int8 made, pruned by 65 % for `int8-sparse`. Weights are random. Needs timm.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --quick --json streaming.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
import report
import streaming_engines
from peers.client import Peer
from streaming_engines import ENGINES, PRECISIONS

_SECONDS = 0.5  # of a measurement
_PAUSE = 0.1  # for the other engines' threads to stop spinning
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    os.environ |= {"TVM_NUM_THREADS": str(options.threads), "TVM_BIND_THREADS": "0"}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = options.keep or Path(scratch)
        facts = _prepared(folder, options)
        peers = {
            name: stack.enter_context(
                Peer(Path(sys.executable), "../streaming_engines", name, str(options.threads))
            )
            for name in ("specqd", *options.engines)
            if all(map(find_spec, ENGINES[name].packages))
        }
        quiet = machine.Quiet({peer.pid for peer in peers.values()})
        quiet.WAIT, quiet.TRIES = (2.0, 1) if options.quick else (quiet.WAIT, quiet.TRIES)
        rows = quiet(lambda: _measure(folder, peers, options))
    details = {
        "model": f"VTN, ResNet-34 at {options.size} x {options.size}, 16 frames, streaming",
        "rounds": options.rounds,
        "threads": options.threads,
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    report.write("streaming", [_table(rows, facts)], details, rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a stream of frames against other engines.")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    others = [name for name in ENGINES if name != "specqd"]
    parser.add_argument("--engines", nargs="+", default=others, choices=others, help="the peers")
    parser.add_argument("--size", type=int, default=224, help="of a frame, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", type=Path, help="folder for what is compiled, to use it again")
    parser.add_argument("--quick", action="store_true", help="frames of 64 pixels, two rounds")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.size = 2, 64
    return options


def _prepared(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the facts of each precision after compiling those that the folder does not hold yet."""
    known = folder / f"facts-{options.size}.json"
    facts: dict[str, Any] = json.loads(known.read_text()) if known.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    for precision in dict.fromkeys(("fp32", *options.precisions)):  # peers read what is exported of fp32
        if precision not in facts:
            worker = streaming_engines.__file__
            command = [sys.executable, worker, "prepare", str(folder), str(options.size), precision]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            facts[precision] = json.loads(found.stdout.splitlines()[-1])
            known.write_text(json.dumps(facts))
    return facts


def _measure(folder: Path, peers: Mapping[str, Peer], options: argparse.Namespace) -> list[Row]:
    runs = {
        (name, precision): partial(peer.seconds, folder=str(folder), precision=precision)
        for precision in options.precisions
        for name, peer in peers.items()
        if precision in ENGINES[name].precisions
    }
    taken = machine.in_turns(runs, options.rounds, _SECONDS, _PAUSE)
    return [
        {"round": number, "engine": name, "precision": precision, "fps": round(1 / seconds, 2)}
        for (name, precision), times in taken.items()
        for number, seconds in enumerate(times)
    ]


def _table(rows: Sequence[Row], facts: Mapping[str, Any]) -> report.Table:
    names = [name for name in ENGINES if any(row["engine"] == name for row in rows)]
    lines, figures = [], {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        cells = [precision]
        for name in names:
            known = [row["fps"] for row in rows if (row["engine"], row["precision"]) == (name, precision)]
            if known:
                figures[f"{name} / {precision}"] = found = report.spread(known)
            cells.append(found.show(1) if known else "")
        lines.append([*cells, f"{facts[precision]['error']:.1e}"])
    return report.Table("Frames a second:", ["precision", *names, "off float32 by"], lines, figures)


if __name__ == "__main__":
    main()

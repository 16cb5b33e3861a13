"""What a KV cache in fewer bits costs and saves: bytes, peak memory of a prompt, time a token, and perplexity.

All of it is measured in compiled code. Memory is what the process takes at most while it reads a prompt, beyond what it
took for the first 128 tokens of it; times are of plain steps, the formats taking turns step by step; perplexity is over
every token of each text, and its loss is against the BF16 cache on the same texts.

    python benchmarks/kv_cache.py --texts FILE.jsonl            # SmolLM2; lines with "id" and a long "text"
    python benchmarks/kv_cache.py --texts FILE.jsonl --quick    # two texts, few steps
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import machine
import numpy as np
import report
from subject import checkpoint, compiled

from specqd.runtime.engine import Engine
from specqd.runtime.model import Model, load

_PASSES = "conv1d-to-linear, fuse-rms-norm, fuse-rope, fuse-linear, insert-kv-cache{{capacity={}}}"
_PLAIN = "bfloat16"
_STEPS = {
    _PLAIN: None,
    "int8": "quantize-kv",
    "int4": "quantize-kv{keys=int4,values=int4}",
    "int4, values rotated": "quantize-kv{keys=int4,values=int4,rotate=true}",
    "int4, 128 recent in bfloat16": "quantize-kv{keys=int4,values=int4,recent=128}",
    **{
        f"turbo4 keys, turbo{values} values, {recent} recent in bfloat16": (
            f"quantize-kv{{keys=turbo4,values=turbo{values},recent={recent}}}"
        )
        for values, recent in ((3, 64), (3, 128), (4, 64))
    },
    **{
        f"turbo{keys} keys, turbo{values} values": f"quantize-kv{{keys=turbo{keys},values=turbo{values}}}"
        for keys, values in ((4, 3), (4, 4), (5, 3))
    },
}
_LENGTHS = (1000, 4000)
_BEGIN = 128  # tokens after which code, weights and scratch are in memory
Figures = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    folder = checkpoint(options.model)
    models = {name: load(_compiled(folder, name), options.threads) for name in options.formats}
    texts = _texts(options, next(iter(models.values())))
    long = [token for text in texts for token in text]
    if len(long) < _LENGTHS[-1] + options.steps:
        raise SystemExit(
            f"the texts have {len(long)} tokens together: {_LENGTHS[-1] + options.steps} are needed"
        )
    quiet = machine.Quiet()
    memory = {name: _memory(model.engine, long[: _LENGTHS[-1]]) for name, model in models.items()}
    seconds = quiet(
        lambda: _times({name: model.engine for name, model in models.items()}, long, options.steps)
    )
    nlls = {name: [_nll(model.engine, text) for text in texts] for name, model in models.items()}
    rows = [
        {
            "format": name,
            **memory[name],
            **{f"ms_at_{length}": 1e3 * median(taken) for length, taken in seconds[name].items()},
            "ppl": math.exp(fmean(nlls[name])),
            "ppl_loss": math.expm1(fmean(nlls[name]) - fmean(nlls[_PLAIN])),
            "ppl_loss_error": _error([a - b for a, b in zip(nlls[name], nlls[_PLAIN], strict=True)]),
        }
        for name in models
    ]
    details = {
        "model": folder.name,
        "texts": options.texts.name,
        "texts read": len(texts),
        "tokens scored": sum(len(text) - 1 for text in texts),
        "steps at each length": options.steps,
        "threads": next(iter(models.values())).engine.threads,
        "isa": next(iter(models.values())).engine.manifest.isa,
        "cores used by other processes, at most": round(quiet.worst, 3),
    }
    name = f"kv_cache-{folder.name}{'-quick' if options.quick else ''}"
    report.write(name, [_table(rows)], details, rows, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure KV caches in fewer bits.")
    parser.add_argument("--model", type=Path, help="BF16 Hugging Face folder (default: SmolLM2, fetched)")
    parser.add_argument("--texts", type=Path, required=True, help='JSON lines with "id" and "text"')
    parser.add_argument("--formats", nargs="+", choices=list(_STEPS), help="which to measure (default: all)")
    parser.add_argument("--most-texts", type=int, default=12, help="of the longest texts")
    parser.add_argument("--tokens", type=int, default=3000, help="of a text, at most")
    parser.add_argument("--steps", type=int, default=96, help="steps of each format at each length")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--quick", action="store_true", help="two texts, 48 steps")
    report.add_options(parser)
    options = parser.parse_args()
    options.formats = list(dict.fromkeys([_PLAIN, *(options.formats or _STEPS)]))
    if options.quick:
        options.most_texts, options.steps = 2, 48
    return options


def _compiled(folder: Path, name: str) -> Path:
    """Compile the model alone with a cache of that format, for 4608 positions."""
    steps = [_PASSES.format(4608), *filter(None, [_STEPS[name]])]
    return compiled(folder, f"cache-{re.sub('[^a-z0-9]+', '-', name)}", ", ".join(steps))


def _texts(options: argparse.Namespace, model: Model) -> list[list[int]]:
    with options.texts.open(encoding="utf-8") as lines:
        texts = [model.encode(json.loads(line)["text"], raw=True) for line in lines]
    return [text[: options.tokens] for text in sorted(texts, key=len, reverse=True)[: options.most_texts]]


def _memory(engine: Engine, text: Sequence[int]) -> Figures:
    """Bytes of a position, of all caches in use for the text, and by which the process grew while it read it."""
    manifest = engine.manifest
    _read(engine, text[:_BEGIN], 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew: see proc(5)
    before = _peak()
    _read(engine, text, _BEGIN)
    return {
        "bytes_a_position": manifest.cache_bytes(16) / 16,
        "cache_bytes": manifest.cache_bytes(len(text)) + manifest.recent_bytes,
        "grown_bytes": _peak() - before,
    }


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _read(engine: Engine, text: Sequence[int], start: int) -> None:
    """Feed a text from a position on in the largest pieces there are."""
    for rows in reversed(engine.rows("target")):
        while len(text) - start >= rows:
            engine.feed("target", text[start : start + rows], start)
            start += rows


def _times(
    engines: Mapping[str, Engine], text: Sequence[int], steps: int
) -> dict[str, dict[int, list[float]]]:
    """Seconds of steps behind texts of each length, the engines taking turns."""
    taken: dict[str, dict[int, list[float]]] = {name: {} for name in engines}
    for length in _LENGTHS:
        for engine in engines.values():
            _read(engine, text[:length], 0)
        for at in range(length, length + steps):
            for name, engine in engines.items():
                began = time.perf_counter()
                engine.feed("target", [text[at]], at)
                taken[name].setdefault(length, []).append(time.perf_counter() - began)
    return taken


def _nll(engine: Engine, text: Sequence[int]) -> float:
    """Mean negative log-likelihood of a text's tokens after the first, in nats."""
    total, rows = 0.0, engine.rows("target", every_row=True)[-1]
    for start in range(0, len(text) - 1, rows):
        told = text[start : min(start + rows, len(text) - 1)]
        logits = engine.feed("target", told, start).logits
        assert logits is not None
        of_rows = logits[: len(told)].astype(np.float64)
        after = text[start + 1 : start + 1 + len(told)]
        highest = of_rows.max(-1)
        sums = highest + np.log(np.exp(of_rows - highest[:, None]).sum(-1))
        total += float((sums - of_rows[np.arange(len(told)), after]).sum())
    return total / (len(text) - 1)


def _error(differences: Sequence[float]) -> float:
    """Standard error of the mean."""
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan


def _table(rows: Sequence[Figures]) -> report.Table:
    plain = rows[0]
    cells = [
        [
            row["format"],
            f"{row['bytes_a_position']:.0f}",
            f"{plain['bytes_a_position'] / row['bytes_a_position']:.2f}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{row['grown_bytes'] / 1e6:.1f}",
            *(
                f"{row[f'ms_at_{length}']:.2f} ({row[f'ms_at_{length}'] / plain[f'ms_at_{length}']:.2f})"
                for length in _LENGTHS
            ),
            f"{row['ppl']:.3f}",
            f"{row['ppl_loss']:+.2%} +- {row['ppl_loss_error']:.2%}" if row is not plain else "",
        ]
        for row in rows
    ]
    title = (
        "A cache of 4000 positions by its format; in brackets times BF16's; standard errors are over texts:"
    )
    head = [
        "cache", "bytes a position", "times fewer", "MB", "MB grown while a prompt is read",
        *(f"ms a token at {length}" for length in _LENGTHS), "perplexity", "more than BF16's",
    ]  # fmt: skip
    return report.Table(title, head, cells, {row["format"]: row for row in rows})


if __name__ == "__main__":
    main()

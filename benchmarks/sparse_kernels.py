"""Products with pruned weights, layer by layer, in turns with our dense kernels of the same precision.

Each weight is there in many copies, which come from memory in turn, as layers of a large model do. A row says what the
fastest format gives, whether codegen would choose it (`chosen`), and which part of the memory's bandwidth was used.

    python benchmarks/sparse_kernels.py                                    # all layers
    python benchmarks/sparse_kernels.py --quick --precisions int8 --json sparse.json
    python benchmarks/sparse_kernels.py --json sparse.json --limit 140     # goes on where the last call stopped
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import machine
import numpy as np
import report
import torch
from sparse_subject import arrays, compiled, stored
from torch import Tensor

from specqd.codegen.isa import ISA
from specqd.codegen.sparse_kernels import PRECISIONS, Choice, choose, ranked

LAYERS = {
    **{f"SmolLM2-135M {name}": shape for name, shape in {
        "qkv": (960, 576), "o": (576, 576), "gate+up": (3072, 576), "down": (576, 1536)}.items()},
    **{f"pycode-90m {name}": shape for name, shape in {
        "qkv": (1280, 768), "o": (768, 768), "gate+up": (4096, 768), "down": (768, 2048)}.items()},
    "4096 x 4096": (4096, 4096), "11008 x 4096": (11008, 4096), "4096 x 11008": (4096, 11008),
}  # fmt: skip
QUICK = ["SmolLM2-135M gate+up", "4096 x 4096"]
#: where zeros are, and which share of weights they are
PATTERNS = (("any", 0.5), ("any", 0.65), ("any", 0.8), ("2:4", 0.5), ("1x4", 0.5), ("16x1", 0.5))
Row = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    isa = machine.instruction_set(options.isa, options.threads)
    rows, quiet = report.Kept(options, _key), machine.Quiet()
    quiet.WAIT, quiet.TRIES = 1.0, 1
    for key in _wanted(options):
        if key not in rows and not rows.late:
            rows.add(quiet(lambda key=key: _measure(*key, isa, options)))  # type: ignore[misc]
    details = {
        "model": "sparse kernels",
        "threads": options.threads,
        "isa": isa.name,
        "cores used by other processes, at most": round(quiet.worst, 2),
    }
    report.write("sparse_kernels", [_table(list(rows.values()))], details, list(rows.values()), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure products with pruned weights layer by layer.")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument(
        "--precisions", nargs="+", default=["int8", "bf16", "f32", "mxfp4"], choices=list(PRECISIONS)
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="rows of a pass, 1 to 8")
    parser.add_argument("--isa", default="native", help="instruction set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mb", type=int, default=400, help="megabytes that the dense copies take at least")
    report.add_limit(parser)
    parser.add_argument("--quick", action="store_true", help="two layers, three rounds")
    report.add_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = [name for name in options.layers if name in QUICK], 3
    return options


def _wanted(options: argparse.Namespace) -> list[tuple[str, str, int, str, float]]:
    return [
        (layer, precision, rows, pattern, share)
        for layer in options.layers
        for precision in options.precisions
        for rows in options.rows
        for pattern, share in PATTERNS
    ]


def _key(row: Row) -> tuple[str, str, int, str, float]:
    return row["layer"], row["precision"], row["rows"], row["pattern"], row["sparsity"]


def _measure(
    layer: str, precision: str, rows: int, pattern: str, share: float, isa: ISA, options: argparse.Namespace
) -> Row:
    n, k = LAYERS[layer]
    values, scales = stored(_pruned(n, k, pattern, share), precision)
    best, dense = ranked([values], precision)[0], Choice(None)
    packed = [arrays(values, scales, precision, choice) for choice in (dense, best)]
    sizes = [sum(array.nbytes for array in of.values()) for of in packed]
    copies = max(2, -(-options.mb * 1_000_000 // sizes[0]))
    made = [
        compiled(n, k, rows, precision, choice, of, copies, isa)
        for choice, of in zip((dense, best), packed, strict=True)
    ]
    taken: list[list[float]] = [[], []]
    for number in range(options.rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            taken[which].append(made[which][0]())
    results = [y.view(np.int32) for _, y in made]
    if not np.array_equal(*results):
        raise SystemExit(f"{layer} in {precision}, {pattern}: the sparse result differs from the dense one")
    fastest = [min(times[1:]) for times in taken]
    seconds = [median(times[1:]) for times in taken]
    return {
        "layer": layer, "format": best.form.name if best.form else "dense", "precision": precision,
        "sparsity": share, "pattern": pattern, "rows": rows,
        "dense_us": round(seconds[0] * 1e6, 2), "sparse_us": round(seconds[1] * 1e6, 2),
        "speedup": round(median(d / s for d, s in zip(taken[0][1:], taken[1][1:], strict=True)), 3),
        "speedup_of_minima": round(fastest[0] / fastest[1], 3), "bytes_ratio": round(sizes[1] / sizes[0], 3),
        "dense_gbps": round(sizes[0] / seconds[0] / 1e9, 1), "sparse_gbps": round(sizes[1] / seconds[1] / 1e9, 1),
        "expected": round(1 / best.time, 2), "chosen": choose([values], precision, isa).form is not None,
    }  # fmt: skip


def _pruned(n: int, k: int, pattern: str, share: float) -> Tensor:
    """A weight whose values have random signs and sizes, none of which rounds to zero, with zeros at random."""
    rng = torch.Generator().manual_seed(0)
    weight = (0.5 + torch.rand(n, k, generator=rng)) * (torch.randint(0, 2, (n, k), generator=rng) * 2 - 1)
    if pattern == "2:4":
        gone = torch.rand(n, k // 4, 4, generator=rng).argsort(-1).lt(2).reshape(n, k)
    else:
        rows, columns = (1, 1) if pattern == "any" else map(int, pattern.split("x"))
        blocks = torch.rand(n // rows, k // columns, generator=rng) < share
        gone = blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return weight.masked_fill(gone, 0)


def _table(rows: Sequence[Row]) -> report.Table:
    headings = [
        "layer",
        "precision",
        "rows",
        "zeros",
        "format",
        "dense us",
        "sparse us",
        "speedup",
        "bytes",
        "GB/s",
        "",
    ]
    lines = [
        [
            r["layer"], r["precision"], str(r["rows"]), f"{r['sparsity']:.0%} {r['pattern']}", r["format"],
            f"{r['dense_us']:.1f}", f"{r['sparse_us']:.1f}", f"{r['speedup']:.2f}", f"{r['bytes_ratio']:.2f}",
            f"{r['dense_gbps']:.0f}, {r['sparse_gbps']:.0f}", "" if r["chosen"] else "no gain on this CPU",
        ]
        for r in rows
    ]  # fmt: skip
    figures = {
        f"{precision} {pattern} {share:.0%}": {
            "speedup": median(r["speedup"] for r in chosen),
            "layers": len(chosen),
        }
        for precision, pattern, share in dict.fromkeys(
            (r["precision"], r["pattern"], r["sparsity"]) for r in rows
        )
        if (
            chosen := [
                r
                for r in rows
                if (r["precision"], r["pattern"], r["sparsity"]) == (precision, pattern, share)
            ]
        )
    }
    return report.Table("Products with pruned weights:", headings, lines, figures)


if __name__ == "__main__":
    main()

"""Figures with their spread, tables of them, and where both go: the screen, result files, the README."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import machine

__all__ = ["Kept", "Spread", "Table", "add_limit", "add_options", "spread", "write"]

_HERE = Path(__file__).parent
_PACKAGES = ("specqd", "apache-tvm", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of one figure over the rounds."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 2, unit: str = "") -> str:
        """Write it as `1.23 (1.20-1.30)`."""
        middle, low, high = (f"{value:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low}-{high})"


def spread(values: Iterable[float]) -> Spread:
    """Summarise one value a round."""
    known = list(values)
    return Spread(median(known), min(known), max(known))


@dataclass(frozen=True)
class Table:
    """A Markdown table and the figures in it by name."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `write` reads."""
    parser.add_argument("-o", "--output", type=Path, default=_HERE / "results", help="folder for the results")
    parser.add_argument("--publish", action="store_true", help="put the tables into benchmarks/README.md too")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what each round measured to this file"
    )


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Add the option that `Kept` reads beside `--json`."""
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which to start no more"
    )


class Kept(dict[tuple[Any, ...], dict[str, Any]]):
    """Rows by key, those of the file of `--json` from the first; each new one goes there, so that a run can go on."""

    def __init__(self, options: argparse.Namespace, key: Callable[[dict[str, Any]], tuple[Any, ...]]) -> None:
        """Read what an earlier run left; its time begins."""
        self._file, self._key, self._until = options.json, key, time.perf_counter() + options.limit
        if self._file and self._file.is_file():
            self.update({key(row): row for row in json.loads(self._file.read_text("utf-8"))})

    @property
    def late(self) -> bool:
        """Whether the time of `--limit` is over."""
        return time.perf_counter() > self._until

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and show it."""
        self[self._key(row)] = row
        print(json.dumps(row), file=sys.stderr, flush=True)
        if self._file:
            self._file.write_text(json.dumps(list(self.values()), indent=1) + "\n", "utf-8")


def write(
    name: str,
    tables: Sequence[Table],
    details: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print the tables; write NAME.md and NAME.json (figures, details and what each round measured).

    `rows` go to the file of `--json`; None: the rounds as they are.
    """
    here, versions = machine.facts(), machine.versions(*_PACKAGES)
    text = "\n\n".join([_heading(details, here, versions), *map(str, tables)])
    print(text)
    # A line for each round: whoever compares two results reads which rounds differ.
    lines = ",\n".join(json.dumps(one, default=asdict) for one in rounds)
    data = {
        "date": date.today().isoformat(),
        "machine": here,
        "versions": versions,
        "details": details,
        "figures": {key: value for table in tables for key, value in table.figures.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.md").write_text(text + "\n", "utf-8")
    head = json.dumps(data, indent=1, default=asdict).removesuffix("\n}")
    (options.output / f"{name}.json").write_text(f'{head},\n "rounds": [\n{lines}\n]\n}}\n', "utf-8")
    if options.json:
        options.json.write_text(
            json.dumps(rounds if rows is None else rows, indent=1, default=asdict) + "\n", "utf-8"
        )
    if options.publish:
        _publish(name, text)


def _heading(details: Mapping[str, Any], here: Mapping[str, str], versions: Mapping[str, str]) -> str:
    own = [f"{key} {value}" for key, value in versions.items()]
    peers = [part for facts in details.get("peers", {}).values() for part in facts["version"].split(", ")]
    plain = {key: value for key, value in details.items() if key not in {"model", "peers", "pipeline"}}
    return "\n".join(
        [
            f"**{details['model']}**, {date.today().isoformat()}, {here['cpu']}, {here['cores']} cores, "
            f"L3 {here['l3']}.",
            f"{'; '.join(f'{key}: {_plain(value)}' for key, value in plain.items())}.",
            f"{', '.join(dict.fromkeys([*own, *peers]))}.",
        ]
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _publish(name: str, text: str) -> None:
    """Replace what stands between the README's two comments for this result."""
    readme = _HERE / "README.md"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = readme.read_text("utf-8")
    if begin not in whole or end not in whole:
        raise SystemExit(f"{readme} has no place for {name}: add the lines {begin} and {end}")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", whole), "utf-8")

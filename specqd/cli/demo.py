"""`specqd demo`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from specqd.cli.app import Threads, app
from specqd.cli.progress import progress_bar

if TYPE_CHECKING:
    from specqd.runtime.generate import Stats
    from specqd.runtime.model import Generation, Model

__all__ = ["demo"]

_PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that checks whether a number is prime, and explain it.",
    "Give me three tips for learning a new language.",
)
_MODEL = "SmolLM2-135M-Instruct"


@app.command()
def demo(
    new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", metavar="N", help="Tokens an answer.")
    ] = 160,
    threads: Threads = None,
) -> None:
    """Fetch SmolLM2-135M, compile it, and answer three prompts plainly and with a draft.

    Model and artifact are kept (in $SPECQD_CACHE or ~/.cache/specqd) for the next time.

    Example: specqd demo
    """
    from specqd.runtime.model import load

    model = load(_artifact(), threads)
    model.generate(_PROMPTS[0], 8)  # reads the weights from disk
    pairs = []
    for prompt in _PROMPTS:
        print(f"\n> {prompt}\n")
        plain = model.generate(
            prompt, new_tokens, speculate=False, on_text=lambda piece: print(piece, end="", flush=True)
        )
        print()
        pairs.append((plain, model.generate(prompt, new_tokens)))
    _table(model, pairs)


def _artifact() -> Path:
    """Return the compiled demo model; fetch and compile what is not there from an earlier time."""
    from specqd.artifact import is_artifact
    from specqd.build import compile_model, default_pipeline
    from specqd.frontends import smollm2
    from specqd.runtime.cpu import cpu_features
    from specqd.verified import cache_directory

    cache = cache_directory()
    folder = cache / _MODEL
    with progress_bar() as tell:
        if not (folder / "config.json").is_file():
            print(f"fetching {_MODEL} (93 MB) into {cache}")
            tell("fetching", 0, 0)
            smollm2.fetch(folder)
        made_of = "\0".join([*_sources(), *_stamps(folder), default_pipeline(), *sorted(cpu_features())])
        target = cache / f"{_MODEL}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.specqd"
        if not is_artifact(target):
            print(f"compiling it for this CPU into {target}")
            compile_model(folder, target, progress=tell)
    return target


def _sources() -> Iterator[str]:
    """Hash the compiler itself, so that a changed one compiles anew."""
    import specqd
    import specqd.codegen
    import specqd.frontends
    import specqd.passes

    for package in (specqd, specqd.codegen, specqd.frontends, specqd.passes):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            yield hashlib.sha256(path.read_bytes()).hexdigest()


def _stamps(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        yield f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"


def _table(model: Model, pairs: list[tuple[Generation, Generation]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from specqd.bandwidth import Bandwidth

    bandwidth = Bandwidth(model.engine)
    bandwidth.measure()
    table = Table(title=f"{_MODEL} on {model.engine.threads} threads")
    table.add_column("", no_wrap=True)
    for heading in ("BF16 alone", "with MXFP4 draft"):
        table.add_column(heading, justify="right")
    both = [[pair[i].stats for pair in pairs] for i in (0, 1)]
    plain, fast = (median(stats.decode_tokens_per_s for stats in side) for side in both)
    per_token = [_bytes_per_token(model, side) for side in both]
    drafted = both[1]
    accepted, examined = sum(s.accepted for s in drafted), sum(s.examined for s in drafted)
    new, rounds = sum(s.new_tokens - 1 for s in drafted), sum(s.rounds for s in drafted)
    table.add_row("tokens/s", f"{plain:.1f}", f"{fast:.1f}")
    table.add_row("acceptance rate", "", f"{accepted / examined:.0%}" if examined else "-")
    table.add_row("tokens a verify pass", "1.00", f"{new / rounds:.2f}" if rounds else "-")
    table.add_row("bytes a token", *(f"{size / 1e6:.0f} MB" for size in per_token))
    rates = (per_token[0] * plain, per_token[1] * fast)
    table.add_row(
        f"of {bandwidth.gbps:.1f} GB/s bandwidth", *(f"{rate / 1e9 / bandwidth.gbps:.0%}" for rate in rates)
    )
    table.add_row("speed-up", "", f"{fast / plain:.2f} x")
    Console(width=80).print("\n", table)
    print("identical: " + ("yes" if all(a.tokens == b.tokens for a, b in pairs) else "no"))


def _bytes_per_token(model: Model, side: list[Stats]) -> float:
    """Weights and cache that all passes, the draft's too, read for each new token; caches as at half way."""
    engine, total = model.engine, 0.0
    target = engine.manifest.chain[0]
    for stats in side:
        middle = stats.prompt_tokens + stats.new_tokens // 2
        total += stats.rounds * engine.step_bytes(target, 1, middle)
        compiled = [level for level in stats.levels if level.name in engine.entries]
        total += sum(level.passes * engine.step_bytes(level.name, 1, middle) for level in compiled)
    return total / sum(stats.new_tokens - 1 for stats in side)

"""Speculation in other engines: transformers' assisted generation and llama.cpp with drafts, beside specqd's own plan.

Every prompt is continued in every way, in turns, greedily, from the same BF16 weights.

    python benchmarks/assisted.py                                # SmolLM2-135M-Instruct
    python benchmarks/assisted.py --model FOLDER --prompts FILE.jsonl --assistant SMALLER_FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import machine
import report
from compiled import Compiled
from peers.client import Peer
from subject import Subject, add_options, prepare, prompts

from specqd.runtime.threads import available_cpus

_PEERS_PYTHON = Path(__file__).parent.parent / ".venv-peers/bin/python"
_OURS = "specqd, its plan"
_PLAIN = {"specqd": "specqd, plain", "llama.cpp": "llama.cpp bf16", "transformers": "transformers plain"}
# Drafts of at most so many tokens, to the end or while the draft is as sure as llama.cpp's server asks.
_DRAFTS = ("{}:4:0", "{}:8:0.75", "{}:16:0.75")
_LOOKUPS = ("lookup:2:10", "lookup:3:5")

Sample = dict[str, Any]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    threads = options.threads or available_cpus()
    compiled = Compiled(subject.artifact, options.threads)
    texts = prompts(subject, compiled.model)[options.skip :][: options.answers]
    compiled.decode(texts[0], 8, compiled.plan)  # reads the weights from disk
    with contextlib.ExitStack() as stack:
        peers = {name: stack.enter_context(peer) for name, peer in _peers(subject, threads, options)}
        quiet = machine.Quiet({peer.pid for peer in peers.values()})
        rounds = [_round(compiled, peers, quiet, text, options, i) for i, text in enumerate(texts)]
    details = {
        "model": subject.name,
        "assistant": options.assistant.name if options.assistant else "none",
        "prompts": len(texts),
        "new tokens": options.new_tokens,
        "plan": compiled.plan,
        "threads": threads,
        "isa": compiled.engine.manifest.isa,
        "identical": compiled.identical,
        "cores used by other processes, at most": round(quiet.worst, 3),
        "peers": {name: peer.facts for name, peer in peers.items()},
    }
    report.write(f"assisted-{subject.name}", [_table(rounds)], details, rounds, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to speculate in several engines.")
    add_options(parser)
    parser.add_argument("--assistant", type=Path, help="BF16 folder of a smaller model, same tokenizer")
    parser.add_argument("--answers", type=int, default=8, help="prompts to answer (default: 8)")
    parser.add_argument("--skip", type=int, default=0, help="prompts to leave out before these")
    parser.add_argument("-n", "--new-tokens", type=int, default=128, help="new tokens a prompt")
    report.add_options(parser)
    return parser.parse_args()


def _peers(subject: Subject, threads: int, options: argparse.Namespace) -> Iterator[tuple[str, Peer]]:
    assistant = [str(options.assistant)] if options.assistant else []
    if _PEERS_PYTHON.is_file():
        models = {
            name: _gguf(subject.checkpoint, subject.made) / f"{name}.gguf" for name in ("bf16", "mxfp4")
        }
        if assistant:
            made = subject.made.with_name(options.assistant.name)
            models["assistant"] = _gguf(options.assistant, made) / "bf16.gguf"
        named = (f"{name}={path}" for name, path in models.items())
        yield "llama.cpp", Peer(_PEERS_PYTHON, "llamacpp_worker", str(threads), *named)
    else:
        print("llama.cpp is left out: `make peers` builds it", file=sys.stderr)
    arguments = (str(threads), str(subject.checkpoint), str(subject.artifact), *assistant)
    yield "transformers", Peer(Path(sys.executable), "assisted_worker", *arguments)


def _gguf(checkpoint: Path, made: Path) -> Path:
    """Write the GGUF files of a checkpoint unless they are there; return their folder."""
    files = made / "gguf"
    if not (files / "mxfp4.gguf").is_file():
        writer = Path(__file__).parent / "peers/gguf_files.py"
        subprocess.run([_PEERS_PYTHON, writer, checkpoint, files], check=True, stderr=subprocess.DEVNULL)
    return files


def _ways(compiled: Compiled, peers: dict[str, Peer]) -> Iterator[tuple[str, Callable[..., Sample]]]:
    yield _PLAIN["specqd"], compiled.decode
    yield _OURS, partial(compiled.decode, plan=compiled.plan)
    if llama := peers.get("llama.cpp"):
        drafts = [name for name in llama.facts["weight_bytes"] if name != "bf16"]
        specs = [*_LOOKUPS, *(draft.format(name) for name in drafts for draft in _DRAFTS)]
        for model in ("bf16", *(f"bf16+{spec}" for spec in specs)):
            yield f"llama.cpp {model}", partial(_ask, llama, model)
    for way in peers["transformers"].facts["ways"]:
        yield f"transformers {way}", partial(_ask, peers["transformers"], way)


def _ask(peer: Peer, model: str, prompt: Sequence[int], new_tokens: int) -> Sample:
    done = peer.decode(model, prompt, new_tokens)
    return {
        "tokens/s": (len(done["tokens"]) - done.get("first", 1)) / done["decode_s"],
        "tokens": done["tokens"],
    }


def _round(
    compiled: Compiled,
    peers: dict[str, Peer],
    quiet: machine.Quiet,
    prompt: list[int],
    options: argparse.Namespace,
    number: int,
) -> dict[str, Sample]:
    ways = list(_ways(compiled, peers))
    begin = number * 5 % len(ways)
    return {
        name: quiet(partial(way, prompt, options.new_tokens)) for name, way in ways[begin:] + ways[:begin]
    }


def _table(rounds: Sequence[dict[str, Sample]]) -> report.Table:
    rows, figures = [], {}
    for name in sorted(rounds[0], key=lambda name: [*_PLAIN].index(name.split(",")[0].split()[0])):
        plain = _PLAIN[name.split(",")[0].split()[0]]
        speed = report.spread(done[name]["tokens/s"] for done in rounds)
        gain = report.spread(done[name]["tokens/s"] / done[plain]["tokens/s"] for done in rounds)
        ours = geometric_mean([done[_OURS]["tokens/s"] / done[name]["tokens/s"] for done in rounds])
        same = sum(done[name].get("tokens") == done[plain].get("tokens") for done in rounds)
        rows.append([name, speed.show(1), gain.show(), f"{ours:.2f}", f"{same} of {len(rounds)}"])
        figures[name] = {
            "tokens/s": speed,
            "of its plain": gain,
            "specqd over it": ours,
            "same answers": same,
        }
    headings = [
        "greedy decoding",
        "tokens/s",
        "of its own plain",
        "specqd's plan over it",
        "answers as its own plain",
    ]
    title = (
        "The same prompts in every way. llama.cpp's drafts are written `MODEL:most tokens:least probability`, its "
        "lookup `lookup:n-gram:tokens`. *specqd's plan over it* is a geometric mean over the prompts:"
    )
    return report.Table(title, headings, rows, figures)


if __name__ == "__main__":
    main()

"""How fast a compiled model decodes, against memory, against transformers and against llama.cpp.

Everything is measured in turns, in rounds of one prompt each: what is compared has run under the same
conditions. Figures are medians over the rounds with the lowest and the highest.

    python benchmarks/decode.py                             # SmolLM2-135M-Instruct, about 6 minutes
    python benchmarks/decode.py --quick                     # rough figures in about 1 minute
    python benchmarks/decode.py --model FOLDER --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import machine
import report
from compiled import Compiled, Sample
from decode_tables import DecodeTables
from peers.client import Peer
from subject import PROMPT_TOKENS, Subject, add_options, prepare, prompts

from specqd.prompts import PASSAGE
from specqd.runtime.threads import available_cpus

_PREFILL = 512  # tokens
_EAGER_TOKENS = 64  # new tokens of transformers, which is slow
_FORMATS = ("bf16", "q4_0", "mxfp4")
_PEERS_PYTHON = Path(__file__).parent.parent / ".venv-peers/bin/python"

Round = dict[str, list[Sample]]
Task = Callable[[], Sample]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    new_tokens: int
    drafts: Sequence[int]
    repeats: int  # passes of each row count a round

    @property
    def middle(self) -> int:
        """Position half way through an answer, where its average step is."""
        return PROMPT_TOKENS + self.new_tokens // 2


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    threads = options.threads or available_cpus()
    plan = Plan(options.rounds, options.new_tokens, options.drafts, 3 if options.quick else 8)
    compiled = Compiled(subject.artifact, options.threads)
    with contextlib.ExitStack() as stack:
        peers = {name: stack.enter_context(peer) for name, peer in _peers(subject, threads, options.peers)}
        quiet = machine.Quiet({peer.pid for peer in peers.values()})
        rounds = []
        texts = prompts(subject, compiled.model)
        compiled.decode(texts[0], 8, compiled.plan)  # reads the weights from disk
        for i in range(plan.rounds):
            tasks = list(_tasks(compiled, peers, plan, texts[i % len(texts)]))
            rounds.append(_round(tasks, i, quiet))
    facts = {name: peer.facts for name, peer in peers.items()}
    tables = DecodeTables(rounds, compiled, facts, plan.drafts, plan.middle)
    details = {
        "model": subject.name,
        "rounds": plan.rounds,
        "prompt tokens": sorted({len(text) for text in texts[: plan.rounds]}),
        "new tokens": plan.new_tokens,
        "new tokens, transformers": min(_EAGER_TOKENS, plan.new_tokens),
        "prefill tokens": _PREFILL,
        "threads": threads,
        "isa": compiled.engine.manifest.isa,
        "pipeline": compiled.engine.manifest.pipeline,
        "plan": compiled.plan,
        "identical": compiled.identical,
        "cores used by other processes, at most": round(quiet.worst, 3),
        "peers": facts,
    }
    name = f"decode-{subject.name}{'-quick' if options.quick else ''}"
    report.write(name, tables.all(), details, rounds, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare decoding with memory bandwidth and with peers.")
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 64 tokens: rough figures")
    parser.add_argument("--rounds", type=int, help="rounds of one prompt each (default: 5)")
    parser.add_argument("-n", "--new-tokens", type=int, help="new tokens a prompt (default: 256)")
    parser.add_argument("--drafts", type=int, nargs="*", help="draft lengths (default: 1 to 6)")
    parser.add_argument("--peers", nargs="*", default=["llama.cpp", "transformers"], help="peers to measure")
    report.add_options(parser)
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.new_tokens = options.new_tokens or (64 if options.quick else 256)
    if options.drafts is None:
        options.drafts = [2, 4] if options.quick else list(range(1, 7))
    return options


def _peers(subject: Subject, threads: int, wanted: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    if "llama.cpp" in wanted and not _PEERS_PYTHON.is_file():
        print("llama.cpp is left out: `make peers` builds it", file=sys.stderr)
    elif "llama.cpp" in wanted:
        files = subject.made / "gguf"
        if not (files / f"{_FORMATS[-1]}.gguf").is_file():
            writer = Path(__file__).parent / "peers/gguf_files.py"
            command = [_PEERS_PYTHON, writer, subject.checkpoint, files]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        models = [f"{name}={files / name}.gguf" for name in _FORMATS]
        yield "llama.cpp", Peer(_PEERS_PYTHON, "llamacpp_worker", str(threads), *models)
    if "transformers" in wanted:
        arguments = (str(threads), str(subject.checkpoint), "bfloat16")
        yield "transformers", Peer(Path(sys.executable), "transformers_worker", *arguments)


def _tasks(
    compiled: Compiled, peers: dict[str, Peer], plan: Plan, prompt: list[int]
) -> Iterator[tuple[str, Task]]:
    """Yield one round's measurements; what is compared stands close together."""
    long = (compiled.model.text.encode(PASSAGE * 8) * 8)[:_PREFILL]
    plain = partial(compiled.decode, prompt, plan.new_tokens)
    yield "stream read", compiled.bandwidth
    yield "specqd plain", plain
    for name, peer in peers.items():
        for model in peer.facts["weight_bytes"]:
            yield f"{name} {model}", partial(_peer_decode, peer, model, prompt, plan.new_tokens)
    yield "stream read", compiled.bandwidth
    yield "specqd passes", partial(compiled.passes, prompt, plan.middle, plan.repeats)
    for length in plan.drafts if compiled.draft else ():
        chain = f"{compiled.target} <- {compiled.draft}@fixed:{length}"
        yield f"specqd draft {length}", partial(compiled.decode, prompt, plan.new_tokens, chain)
    if compiled.draft:
        yield "specqd plan", partial(compiled.decode, prompt, plan.new_tokens, compiled.plan)
    yield "specqd plain", plain
    yield "stream read", compiled.bandwidth
    yield "specqd prefill", partial(compiled.prefill, long)
    for name, peer in peers.items():
        for model in peer.facts["weight_bytes"]:
            yield f"{name} {model} prefill", partial(_peer_prefill, peer, model, long)
    yield "specqd prefill", partial(compiled.prefill, long)


def _round(tasks: list[tuple[str, Task]], number: int, quiet: machine.Quiet) -> Round:
    """Run the tasks, each round starting at another one."""
    begin = number * 5 % len(tasks)
    done: Round = {}
    for name, task in tasks[begin:] + tasks[:begin]:
        if sys.stderr.isatty():
            print(f"\rround {number + 1}: {name:<40}", end="\r", file=sys.stderr, flush=True)
        done.setdefault(name, []).append(quiet(task))
    return done


def _peer_decode(peer: Peer, model: str, prompt: list[int], new_tokens: int) -> Sample:
    if model == "bfloat16":
        new_tokens = min(new_tokens, _EAGER_TOKENS)
    done = peer.decode(model, prompt, new_tokens)
    return {"tokens/s": (len(done["tokens"]) - 1) / done["decode_s"]}


def _peer_prefill(peer: Peer, model: str, prompt: list[int]) -> Sample:
    return {"tokens/s": len(prompt) / peer.prefill(model, prompt)}


if __name__ == "__main__":
    main()

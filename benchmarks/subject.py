"""What a benchmark measures: a checkpoint, its artifact compiled by the code as it is now, and prompts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specqd.prompts import PROMPTS
from specqd.runtime.model import Model
from specqd.verified import cache_directory

__all__ = ["PROMPT_TOKENS", "Subject", "add_options", "prepare", "prompts"]

PROMPT_TOKENS = 64

# Brings the built-in chat prompts of 47 to 56 tokens to between 64 and 73.
_MORE = " Take your time, write in plain words, and go one step after the other."


@dataclass(frozen=True)
class Subject:
    """A BF16 checkpoint folder, its artifact, and a folder for what else is made of it."""

    name: str
    checkpoint: Path
    artifact: Path
    made: Path
    prompt_file: Path | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `prepare` reads."""
    parser.add_argument("--model", type=Path, help="BF16 Hugging Face folder (default: SmolLM2, fetched)")
    parser.add_argument("--artifact", type=Path, help="measure this artifact instead of compiling the model")
    parser.add_argument(
        "--prompts", type=Path, help='JSON lines with "text", instead of built-in chat prompts'
    )
    parser.add_argument("--threads", type=int, help="CPU threads, for the peers too (default: all)")


def prepare(options: argparse.Namespace) -> Subject:
    """Fetch what is missing and compile, in another process: this one stays as small as a user's."""
    folder = checkpoint(options.model)
    artifact = options.artifact or compiled(folder)
    return Subject(folder.name, folder, artifact, _made(folder), options.prompts)


def checkpoint(model: Path | None) -> Path:
    """Return the folder of a checkpoint, by default SmolLM2's, which is fetched if need be."""
    if model is not None:
        return model
    folder = cache_directory() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        from specqd.frontends.smollm2 import fetch

        fetch(folder)
    return folder


def compiled(folder: Path, name: str = "compiled", pipeline: str | None = None) -> Path:
    """Compile a checkpoint, through the usual passes unless told others, into an artifact of that name."""
    artifact = _made(folder) / f"{name}.specqd"
    artifact.parent.mkdir(parents=True, exist_ok=True)
    command = ["compile", str(folder), "--output", str(artifact), "--force"]
    if pipeline is not None:
        command += ["--pipeline", pipeline]
    subprocess.run([sys.executable, "-m", "specqd.cli", *command], check=True)
    return artifact


def _made(folder: Path) -> Path:
    return cache_directory() / "benchmarks" / folder.name


def prompts(subject: Subject, model: Model) -> Sequence[list[int]]:
    """Token ids of all prompts; a text from a file counts with its last 64 tokens, if it has as many."""
    if subject.prompt_file is None:
        return [model.encode(prompt + _MORE) for prompt in PROMPTS]
    with subject.prompt_file.open(encoding="utf-8") as lines:
        texts = [model.encode(json.loads(line)["text"], raw=True) for line in lines]
    return [text[-PROMPT_TOKENS:] for text in texts if len(text) >= PROMPT_TOKENS]

"""Prompts to tune for: from a file, or the built-in ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from specqd.errors import InputError
from specqd.prompts import PROMPTS

__all__ = ["MOST", "builtin_prompts", "read_prompts"]

MOST = 8
"""Prompts that are used, spread evenly over those that there are."""


def builtin_prompts() -> list[str]:
    """Return questions of various kinds."""
    return _spread(PROMPTS)


def read_prompts(path: Path) -> tuple[list[str], bool]:
    """Read a file of prompts, and say whether they are to be continued as they are, without a chat template.

    A `.jsonl` file has an object with a `text`, to be continued as it is, in each line; any other file is text with
    a prompt in each line. Empty lines are passed over.

    Raises:
        InputError: the file cannot be read, holds no prompt, or a line is not as it should be.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeError as error:
        raise InputError(
            f"{path} holds bytes that are not UTF-8: convert it, for example with `iconv`"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read prompts from {path} ({error.strerror}): give a file of prompts"
        ) from error
    raw = path.suffix == ".jsonl"
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise InputError(f"{path} holds no prompt: write one in each line")
    return _spread([_text(path, number, line) if raw else line for number, line in kept]), raw


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError):
        text = None
    if not isinstance(text, str) or not text:
        raise InputError(f'line {number} of {path} is no JSON object with a "text": write {{"text": "..."}}')
    return text


def _spread(prompts: Sequence[str]) -> list[str]:
    count = min(MOST, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]

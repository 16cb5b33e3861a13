"""Text to calibrate on or to count, as tokens: a file, or its beginning in pieces."""

from __future__ import annotations

from pathlib import Path

from specqd.errors import InputError
from specqd.program import Entry, ModelInfo
from specqd.runtime.text import Text

__all__ = ["encode_file", "known_to", "read_file", "tokenizer"]

_PIECE = 512
"""Positions of one text at most: attention's memory grows with the square."""


def tokenizer(model: ModelInfo) -> Text | None:
    """Return the model's tokenizer, if the model came with one."""
    found = next((Path(file) for file in model.tokenizer_files if Path(file).name == "tokenizer.json"), None)
    return None if found is None else Text(found.parent, model.vocab_size)


def encode_file(path: str, model: ModelInfo) -> list[int]:
    """Return the tokens of a UTF-8 file.

    Raises:
        InputError: the file cannot be read as UTF-8, or the model has no tokenizer.
        ArtifactError: the tokenizer cannot be read.
    """
    text = tokenizer(model)
    if text is None:
        raise InputError(
            f"the text {path} cannot be used: the model came without tokenizer.json; add it, or leave out text="
        )
    try:
        return text.encode(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the text {path} is not UTF-8 (byte {error.start}): convert it") from error


def read_file(path: str, model: ModelInfo, tokens: int) -> list[list[int]]:
    """Return the first `tokens` tokens of a UTF-8 file in texts of at most 512; each begins with BOS if the first does.

    Raises:
        InputError: the file cannot be read as UTF-8 or is too short, or the model has no tokenizer.
        ArtifactError: the tokenizer cannot be read.
    """
    ids = encode_file(path, model)
    if len(ids) < tokens:
        raise InputError(
            f"the text {path} holds {len(ids)} tokens, fewer than tokens={tokens}: give a longer text, or "
            "fewer tokens"
        )
    begin = [ids[0]] if ids[0] == model.bos_token_id else []
    rest, size = ids[len(begin) : tokens], piece(model) - len(begin)
    return [begin + rest[at : at + size] for at in range(0, len(rest), size)]


def known_to(entry: Entry, texts: list[list[int]]) -> list[list[int]]:
    """Cut texts to what a draft from another checkpoint takes; at run time too, it sees 0 for a token it lacks."""
    if entry.vocab_size is None:
        return texts
    return [
        [token if token < entry.vocab_size else 0 for token in text[: entry.max_positions]] for text in texts
    ]


def piece(model: ModelInfo) -> int:
    """Return how many tokens a text has at most."""
    return min(_PIECE, model.max_positions or _PIECE)

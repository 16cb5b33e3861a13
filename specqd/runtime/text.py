"""Text to tokens and back: tokenizer.json, chat templates, and text that appears while tokens arrive."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from specqd.errors import ArtifactError, InputError

__all__ = ["Detokenizer", "Message", "Text"]

Message = Mapping[str, Any]
"""One turn of a chat, as in transformers: `{"role": "user", "content": "..."}`."""

_BROKEN = "�"  # what decoding gives for bytes that are no whole character (yet)


class Text:
    """The tokenizer of an artifact, with the model's chat template if it has one.

    Raises:
        ArtifactError: there is no readable tokenizer, or it has more entries than the model's vocabulary.
    """

    def __init__(self, directory: Path, vocab_size: int) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{directory} has no tokenizer.json: give token ids instead of text")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self._config = _read_json(directory / "tokenizer_config.json")
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise ArtifactError(f"cannot read the tokenizer in {directory}: {error}") from error
        entries = self._tokenizer.get_vocab_size(with_added_tokens=False)
        if entries > vocab_size:
            raise ArtifactError(
                f"{path} has {entries} entries and the model's vocabulary {vocab_size}: it belongs to "
                f"another model; compile again with the right one"
            )
        self._vocab_size = vocab_size
        self._template_file = directory / "chat_template.jinja"

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template's text; a model that was not trained to chat has none."""
        if self._template_file.is_file():
            return self._template_file.read_text("utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several under names, as in older checkpoints
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text: str) -> list[int]:
        """Tokenise text, with the tokens that the tokenizer itself puts around it (such as BOS)."""
        return self._known(self._tokenizer.encode(_written(text)).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokenise a chat up to where the model's answer begins.

        Raises:
            InputError: there is no chat template, or it does not take these messages.
        """
        text = _written(self.render(messages))
        return self._known(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def render(self, messages: Sequence[Message]) -> str:
        """Write a chat out with the model's template, as transformers does."""
        if self.chat_template is None:
            raise InputError("this model has no chat template: give the prompt as plain text (`--raw`)")
        from specqd.runtime.chat import render

        return render(self.chat_template, messages, self._special_tokens())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, leaving out special ones."""
        return self._tokenizer.decode(tokens)

    def detokenizer(self) -> Detokenizer:
        """Start a text that grows token by token."""
        return Detokenizer(self)

    def _special_tokens(self) -> dict[str, str]:
        """Return the names a template may use, such as `bos_token`."""
        found = {}
        for name, value in self._config.items():
            if name.endswith("_token"):
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    found[name] = value
        return found

    def _known(self, tokens: list[int]) -> list[int]:
        beyond = max(tokens, default=0)
        if beyond >= self._vocab_size:
            raise InputError(
                f"the prompt holds token {beyond} ({self._tokenizer.id_to_token(beyond)!r}), beyond the "
                f"model's vocabulary of {self._vocab_size}: the tokenizer and the model do not match"
            )
        return tokens


class Detokenizer:
    """Text of a growing list of tokens: pieces that add up to the text of the whole.

    A piece is held back while it ends inside a character. Each piece is decoded together with the tokens of
    the piece before, because what a token looks like may depend on what stands before it (a leading space).
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._context = 0  # where the piece before began
        self._shown = 0  # tokens whose text is out

    def add(self, tokens: Sequence[int]) -> str:
        """Take tokens; return the text that is now certain."""
        self._tokens.extend(tokens)
        piece = self._piece()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return piece

    def finish(self) -> str:
        """Return what is still held back, broken characters included."""
        piece = self._piece()
        self._context = self._shown = len(self._tokens)
        return piece

    def _piece(self) -> str:
        before = self._text.decode(self._tokens[self._context : self._shown])
        return self._text.decode(self._tokens[self._context :])[len(before) :]


def _written(text: str) -> str:
    """Return the text; raises InputError if it has half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(
            f"the prompt has {half!a} at position {error.start}, which is no character: it was decoded from bytes "
            "that are not UTF-8; decode them with errors='replace'"
        ) from error
    return text


def _read_json(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return fields if isinstance(fields, dict) else {}

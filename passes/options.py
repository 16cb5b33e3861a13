"""Options of a pass as text: `scale=search`, `keep=*.o_proj.*|lm_head.*`, `capacity=512`.

A class can be an option's type that has `parse`, from text; `choices`, in words; and the text as its `str`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from specqd.errors import InputError

__all__ = ["Option", "fault", "options", "read", "split", "write"]

_NEEDS_QUOTES = re.compile(r"""[\s,{}|"=]|^$""")
_CLOSED_QUOTE = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Option:
    """One field of a pass: its name, its type (`kind`), its default, and what the docstring says of it."""

    name: str
    kind: Any
    default: Any
    doc: str

    @property
    def choices(self) -> str:
        """The values it takes, in words: `floor | even`, `int`, `names joined by |`."""
        if get_origin(self.kind) is Literal:
            return " | ".join(map(write, get_args(self.kind)))
        if self.kind == tuple[str, ...]:
            return "names joined by |"
        if hasattr(self.kind, "parse"):
            return str(self.kind.choices)
        return {bool: "true | false", str: "text"}.get(
            self.kind, getattr(self.kind, "__name__", str(self.kind))
        )


def options(pass_type: type) -> tuple[Option, ...]:
    """Return the options of a pass class, in the order of its fields."""
    hints, docs = get_type_hints(pass_type), _documented(pass_type.__doc__ or "")
    return tuple(
        Option(f.name, hints[f.name], f.default, docs.get(f.name, "")) for f in dataclasses.fields(pass_type)
    )


def _documented(doc: str) -> dict[str, str]:
    """Read the `Attributes:` section of a Google docstring: name to its text on one line."""
    section = doc.partition("Attributes:\n")[2].partition("\n\n")[0]
    indent = min((len(line) - len(line.lstrip()) for line in section.splitlines() if line.strip()), default=0)
    items = re.findall(rf"(?m)^ {{{indent}}}(\w+): ((?:.|\n)*?)(?=\n {{{indent}}}\w+: |\Z)", section)
    return {name: " ".join(text.split()) for name, text in items}


def fault(kind: Any, value: Any) -> str | None:
    """Say why a value is not of an option's type, or nothing."""
    if get_origin(kind) is Literal:
        good = value in get_args(kind)
    elif kind == tuple[str, ...]:
        good = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    else:
        good = type(value) is kind
    return None if good else f"{value!r} is not one of {Option('', kind, None, '').choices}"


def read(kind: Any, text: str) -> Any:
    """Turn an option's text into a value of type `kind`; raises ValueError if it is none."""
    if kind == tuple[str, ...]:
        return tuple(_unquoted(part) for part in split(text, "|")) if text else ()
    word = _unquoted(text)
    if hasattr(kind, "parse"):
        return kind.parse(word)
    if kind is bool:
        return {"true": True, "false": False}[word] if word in ("true", "false") else word
    if get_origin(kind) is Literal:
        return next((v for v in get_args(kind) if write(v) == text), word)
    return kind(word) if kind in (int, float) else word


def write(value: Any) -> str:
    """Turn an option's value into the text that `read` turns back."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "|".join(map(write, value))
    text = str(value) if isinstance(value, str) or hasattr(value, "parse") else repr(value)
    return json.dumps(text, ensure_ascii=False) if _NEEDS_QUOTES.search(text) else text


def split(text: str, separator: str) -> list[str]:
    """Cut text at a separator outside quotes and braces; raises InputError if one of those is left open."""
    parts, depth, at = [""], 0, 0
    while at < len(text):
        quoted = _CLOSED_QUOTE.match(text, at)
        token = quoted.group() if quoted else text[at]
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0 or token == '"':
            raise InputError(f"{text!r} has a {token} at character {at + 1} without its partner")
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
        at += len(token)
    if depth:
        raise InputError(f"{text!r} has a {{ without its partner")
    return [part.strip() for part in parts]


def _unquoted(text: str) -> str:
    return json.loads(text) if text.startswith('"') else text

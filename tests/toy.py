"""A toy artifact for tests of the runtime: functions with specqd's calling convention, built by TVM.

The toy model's next token depends on every token in the cache up to a position, so a cache slot that was not
rolled back, or a position off by one, changes what it says. Its drafts are wrong now and then.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specqd.artifact import Arg, Compiled, Function, Manifest, save
from specqd.manifest import BLOCK

CAPACITY = 64
VOCAB = 50
EOS = 7
ROWS = (1, 2, 3, 4, 8, 16)
WRITER = 256  # a cache holds a token, and this times the `wrong_every` of the entry that fed it


@dataclass(frozen=True)
class Draft:
    """An entry of the toy: its cache (`kv` is the target's) and how often it is wrong."""

    cache: str = "kv"
    wrong_every: int = 3
    rows: tuple[int, ...] = (1, 2)


def mix(tokens: Sequence[int]) -> int:
    """Hash a sequence as the compiled code does."""
    value = 0
    for place, token in enumerate(tokens):
        value = (value * 31 + token * (place + 3)) % 10007
    return value


def model_next(tokens: Sequence[int], table: Sequence[int], wrong_every: int = 0) -> int:
    """Say what the toy model says after `tokens`."""
    value = mix(tokens)
    return table[(value + (wrong_every > 0 and value % wrong_every == 0)) % VOCAB]


def table(seed: int = 0) -> np.ndarray:
    """The only weight: a permutation of the vocabulary."""
    return np.random.default_rng(seed).permutation(VOCAB).astype(np.int32)


def _prim_func(name: str, rows: int, wrong: int, last_only: bool) -> object:
    from tvm.script import tirx as T  # noqa: N812

    outputs = 1 if last_only else rows
    first = rows - 1 if last_only else 0

    @T.prim_func
    def step(
        tokens: T.Buffer((rows,), "int32"),
        positions: T.Buffer((rows,), "int32"),
        tables: T.Buffer((rows,), "int32"),
        following: T.Buffer((outputs,), "int32"),
        cache_handle: T.handle,
        blocks_handle: T.handle,
        weight: T.Buffer((VOCAB,), "int32"),
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        cache_size = T.int32()
        blocks_size = T.int32()
        cache = T.match_buffer(cache_handle, (cache_size,), "uint16")
        blocks = T.match_buffer(blocks_handle, (blocks_size,), "int32")
        value = T.alloc_buffer((1,), "int32")
        for i in range(rows):
            cache[blocks[tables[i] + 2 + positions[i] // BLOCK] * BLOCK + positions[i] % BLOCK] = T.cast(
                tokens[i] + WRITER * wrong, "uint16"
            )
        for i in range(outputs):
            value[0] = 0
            for j in range(positions[first + i] + 1):
                value[0] = (
                    value[0] * 31
                    + T.cast(cache[blocks[tables[first + i] + 2 + j // BLOCK] * BLOCK + j % BLOCK], "int32")
                    % WRITER
                    * (j + 3)
                ) % 10007
            following[i] = weight[
                (value[0] + T.if_then_else(wrong > 0 and value[0] % T.max(wrong, 1) == 0, 1, 0)) % VOCAB
            ]

    return step


def _function(entry: str, rows: int, draft: Draft, last_only: bool) -> Function:
    args = (
        Arg(name="tokens", kind="tokens", dtype="int32", shape=(rows,)),
        Arg(name="positions", kind="positions", dtype="int32", shape=(rows,)),
        Arg(name="tables", kind="tables", dtype="int32", shape=(rows,)),
        Arg(name="next", kind="next", dtype="int32", shape=(1 if last_only else rows,)),
        Arg(name=draft.cache, kind="cache", dtype="uint16", shape=(1, BLOCK)),
        Arg(name="blocks", kind="blocks", dtype="int32", shape=(1,)),
        Arg(name="table", kind="weight", dtype="int32", shape=(VOCAB,)),
    )
    return Function(entry=entry, rows=rows, last_only=last_only, symbol=f"{entry}_{rows}", args=args)


def compile_toy(folder: Path, wrong_every: int = 3, drafts: Mapping[str, Draft] | None = None) -> Compiled:
    """Compile a target and its drafts: by default `draft`, which shares the target's cache, and `other`."""
    import tvm

    entries = {
        "target": Draft("kv", 0, ROWS),
        **(
            drafts
            or {
                "draft": Draft("kv", wrong_every),
                "other": Draft("kv_other", wrong_every),
            }
        ),
    }
    functions, code = [], {}
    for entry, draft in entries.items():
        for rows in draft.rows:
            last_only = entry == "target" and rows == 16
            function = _function(entry, rows, draft, last_only)
            code[function.symbol] = _prim_func(function.symbol, rows, draft.wrong_every, last_only)
            functions.append(function)
    path = folder / "toy.so"
    tvm.compile(tvm.IRModule(code), target="llvm").export_library(str(path))
    return Compiled(path, {"table": table()}, tuple(functions), "generic", (), "x86_64-unknown-linux-gnu")


def facts(**changes: object) -> dict[str, object]:
    """Manifest fields of the toy artifact."""
    return {
        "family": "toy",
        "source": "tests",
        "pipeline": "",
        "chain": ("target", "draft"),
        "capacity": CAPACITY,
        "vocab_size": VOCAB,
        "eos_token_ids": (EOS,),
        "plan": "target <- draft@fixed:3",
        **changes,
    }


def save_toy(target: Path, compiled: Compiled, files: Iterable[Path] = (), **changes: object) -> Manifest:
    """Write the toy artifact, with the given tokenizer files."""
    fields = facts(**changes)
    return save(target, compiled, fields, tokenizer_files=files, graphs={"target": "toy\n"}, force=True)


def write_tokenizer(folder: Path, template: str | None = None) -> list[Path]:
    """Write a tokenizer of 50 entries: letters, the two bytes of "ü", EOS and fillers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["<s>", "<e>", "x1", "x2", "x3", "x4", "x5", "</s>", "Ġ", "Ã", "¼"]
    entries = words + letters + [f"<r{i}>" for i in range(VOCAB - len(words) - len(letters))]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [], unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<e>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]

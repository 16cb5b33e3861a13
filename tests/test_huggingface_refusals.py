"""What cannot be captured is said in one sentence that names what was met and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from family_configs import FAMILIES, VOCAB, random_model
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from specqd.errors import CaptureError
from specqd.frontends import capture
from specqd.frontends.attention import CausalMask, register

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    random_model(FAMILIES["llama"]()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["max_position_embeddings", "num_attention_heads", "head_dim", "vocab_size"])
@pytest.mark.parametrize("value", [0, -4, 2.5, "4", True])
def test_impossible_sizes(folder: Path, name: str, value: Any) -> None:
    change_config(folder, **{name: value})
    assert f"says {name}: {json.dumps(value)}, which must be a whole number above 0" in refusal(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/at/all", "two words", "lost.gguf", Path("nowhere")]
)
def test_nothing_at_the_path(source: str | Path) -> None:
    assert "neither a folder nor a .gguf file" in refusal(source)


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("nobody/has-this-model")
    assert "nobody/has-this-model is not a local folder" in message
    assert "give a local folder, or go online" in message


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    assert "give the folder that holds config.json" in refusal(folder / "model.safetensors")


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    assert f"transformers cannot load {tmp_path / 'model.gguf'}" in refusal(tmp_path / "model.gguf")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "is not valid JSON"), ("[]", "holds no JSON object but a list"), ("{}", "names no model_type")],
)
def test_a_config_that_is_none(folder: Path, text: str, why: str) -> None:
    (folder / "config.json").write_text(text)
    assert why in refusal(folder)


def test_a_config_transformers_rejects(folder: Path) -> None:
    change_config(folder, hidden_size=47)
    assert "transformers cannot load" in refusal(folder)


def test_unknown_architecture(folder: Path) -> None:
    change_config(folder, model_type="llama17")
    assert "the architecture 'llama17', which transformers does not know; check" in refusal(folder)
    change_config(folder, auto_map={"AutoConfig": "x.Config"})
    assert "brings its own code, which specqd does not run" in refusal(folder)


@pytest.mark.parametrize(("changes", "why"), [
    ({"model_type": "t5", "is_encoder_decoder": True}, "holds an encoder-decoder (t5)"),
    ({"model_type": "vit"}, "holds a vit model, which is no causal language model"),
    ({"quantization_config": {"quant_method": "gptq"}}, "already quantised (gptq); give the original BF16"),
])  # fmt: skip
def test_other_kinds_of_model(folder: Path, changes: dict[str, Any], why: str) -> None:
    change_config(folder, **changes)
    assert why in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "reads no pickled weights: save the model again as safetensors" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert refusal(folder).endswith("has no model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_file_cut_off(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is cut off or damaged" in refusal(folder)


def test_a_damaged_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"?" + path.read_bytes()[9:])
    assert f"{path} is cut off or damaged" in refusal(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "lacks model-00001-of-00002.safetensors, listed in model.safetensors.index.json"
    assert message in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(folder)


def test_a_missing_tensor_is_never_made_up(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks 1 of the tensors" in refusal(folder)
    change_config(folder, num_hidden_layers=5)
    assert "such as model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    assert "holds model.norm.weight as [7] where config.json asks for [48]" in refusal(folder)


def test_a_bias_the_configuration_would_ignore(folder: Path) -> None:
    change_config(folder, mlp_bias=False)
    assert "holds model.layers.0.mlp.down_proj.bias, which the architecture" in refusal(folder)


def test_a_tokenizer_of_another_model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB + 1)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    message = f"its token 'w{VOCAB}' has id {VOCAB}, but the model embeds {VOCAB} tokens only"
    assert message in refusal(folder)
    other = tmp_path_factory.mktemp("tokenizer")
    (other / "tokenizer.json").write_text("{}")
    assert "is no tokenizer that can be read" in refusal(folder, tokenizer=other)


@pytest.mark.parametrize(("config", "module"), [
    (transformers.FalconConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
     "transformer.h.0.self_attention (FalconAttention)"),
    (transformers.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=4),
     "transformer.h.0.self_attention (BloomAttention)"),
    (transformers.MptConfig(vocab_size=VOCAB, d_model=48, n_layers=2, n_heads=4),
     "transformer.blocks.0.attn (MptAttention)"),
], ids=["falcon", "bloom", "mpt"])  # fmt: skip
def test_families_that_compute_attention_themselves(
    config: PretrainedConfig, module: str, tmp_path: Path
) -> None:
    random_model(config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert message.startswith(f"{module} computes attention itself")
    assert repr(config.model_type) in message


@pytest.mark.parametrize(("config", "why"), [
    (transformers.BertConfig(**SMALL), "not causal with a fixed window (position 0 sees position 1)"),
    (transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=0),
     "MistralAttention of layer 0 asks for an attention mask that is not causal with a fixed window"),
    (transformers.MambaConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2), "no position_ids"),
    (transformers.Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
     "mixes tokens outside of attention"),
    (transformers.JambaConfig(**SMALL, num_key_value_heads=2), "depends on the number of tokens"),
    (transformers.Llama4TextConfig(**SMALL, num_key_value_heads=2, intermediate_size_mlp=56, head_dim=12,
                                   num_local_experts=2, attention_chunk_size=4),
     "it depends on more than positions, as chunks"),
    (transformers.DiffLlamaConfig(**SMALL, num_key_value_heads=2), "layer 0 attends twice"),
    (transformers.DogeConfig(**SMALL, num_key_value_heads=2),
     "model.layers.0.self_attn (DogeAttention) reads the attention mask itself at modeling_doge.py"),
], ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "")  # fmt: skip
def test_decoders_that_a_cache_of_keys_and_values_cannot_continue(config: PretrainedConfig, why: str) -> None:
    assert why in refusal(random_model(config))


@pytest.mark.parametrize(("model", "why"), [
    (torch.nn.Linear(3, 3), "Linear is not a transformers model"),
    (transformers.LlamaModel(FAMILIES["llama"]()), "LlamaModel has no language model head"),
    (transformers.BartForCausalLM(transformers.BartConfig(d_model=16, vocab_size=VOCAB, decoder_layers=1)),
     "takes no position_ids"),
    (transformers.LlamaForCausalLM(FAMILIES["llama"]()).to("meta"), "is on meta; move the model to the CPU"),
], ids=["module", "headless", "encoder-decoder", "meta"])  # fmt: skip
def test_objects_that_are_not_decoders(model: torch.nn.Module, why: str) -> None:
    assert why in refusal(model)


class Layer(torch.nn.Module):
    layer_idx = 3
    is_causal = True


@pytest.mark.parametrize(("changes", "why"), [
    ({"position_bias": torch.zeros(1)}, "passes position_bias to its attention, unknown to specqd"),
    ({"attention_mask": None}, "is given no mask instead"),
    ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "a mask of its own making (such as ALiBi)"),
    ({"is_causal": False}, "Layer of layer 3 is not causal"),
    ({"dropout": 0.1}, "drops attention weights out; call model.eval()"),
    ({"key": torch.zeros(1, 1, 5, 8)}, "does not compile cross attention"),
])  # fmt: skip
def test_arguments_of_attention_that_would_change_its_meaning(changes: dict[str, Any], why: str) -> None:
    register()
    attention = transformers.AttentionInterface()["specqd"]
    given = {
        "query": torch.zeros(1, 2, 4, 8),
        "key": torch.zeros(1, 1, 4, 8),
        "value": torch.zeros(1, 1, 4, 8),
    }
    given |= {"attention_mask": CausalMask(0), "scaling": None, "softcap": None, "use_cache": False}
    assert attention(Layer(), **given)[0].shape == (1, 4, 2, 8)
    with pytest.raises(CaptureError) as caught:
        attention(Layer(), **(given | changes))
    assert why in str(caught.value)


def test_attention_without_a_layer_index() -> None:
    register()
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(CaptureError, match="has no layer_idx"):
        transformers.AttentionInterface()["specqd"](torch.nn.Module(), q, q, q, CausalMask(0))

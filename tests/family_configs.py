"""Tiny random configurations, one for each decoder family, with the corners that each of them has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "FURTHER", "LAYER_WINDOWS", "MIXTURES", "POSITIONS", "VOCAB", "WINDOW", "random_model"]

VOCAB = 97
WINDOW = 5
POSITIONS = 64

_PARTIAL = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_SCALED_BY_POSITION = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_WIDE_HEADS = {"head_dim": 12}  # 6 heads x 12 channels on 48: the attention is wider than the stream
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, **_WIDE_HEADS}


def _of(kind: str, **changes: Any) -> Callable[[], PretrainedConfig]:
    """Three layers, six query and two key heads on 48 channels, with `changes` (None leaves a field out)."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    fields = {name: value for name, value in (common | changes).items() if value is not None}
    return lambda: getattr(transformers, f"{kind}Config")(**fields)


def _gpt(kind: str, **changes: Any) -> Callable[[], PretrainedConfig]:
    """The same in the words of GPT-2's configuration."""
    common = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": POSITIONS}
    return lambda: getattr(transformers, f"{kind}Config")(
        **(common | {"bos_token_id": 1, "eos_token_id": 2} | changes)
    )


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _of("Llama", **_WIDE_HEADS, rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True),
    "qwen2": _of(
        "Qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": _of("Qwen3", **_WIDE_HEADS),
    "mistral": _of("Mistral", **_WIDE_HEADS, sliding_window=WINDOW),
    "gemma": _of("Gemma", **_WIDE_HEADS),
    "gemma2": _of(
        "Gemma2",
        **_WIDE_HEADS,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3_text": _of(
        "Gemma3Text",
        **_WIDE_HEADS,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": _of("Phi", rope_parameters=_PARTIAL),
    "phi3": _of("Phi3", sliding_window=WINDOW),
    "gpt_neox": _of(
        "GPTNeoX", num_key_value_heads=None, rope_parameters={**_PARTIAL, "partial_rotary_factor": 0.25}
    ),
    "olmo": _of("Olmo", clip_qkv=0.5),
    "olmo2": _of("Olmo2"),
    "granite": _of(
        "Granite",
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.1,
        logits_scaling=2.0,
    ),
    "stablelm": _of("StableLm", rope_parameters=_PARTIAL, qk_layernorm=True, use_qkv_bias=True),
    "smollm3": _of("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0]),
    "cohere": _of("Cohere", use_qk_norm=True, logit_scale=0.5),
    "cohere2": _of(
        "Cohere2",
        **_WIDE_HEADS,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        logit_scale=0.5,
        layer_types=_ALTERNATING,
    ),
    "gpt2": _gpt("GPT2", n_head=4, n_inner=56, scale_attn_by_inverse_layer_idx=True),
    "opt": _of("OPT", ffn_dim=56, word_embed_proj_dim=24, intermediate_size=None, num_key_value_heads=None),
    "starcoder2": _of("Starcoder2", sliding_window=WINDOW),
    "mixtral": _of("Mixtral", **_MIXTURE, sliding_window=WINDOW),
    "qwen2_moe": _of(
        "Qwen2Moe",
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": _of(
        "Qwen3Moe",
        **_WIDE_HEADS,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "olmoe": _of("Olmoe", num_experts=5, num_experts_per_tok=2, clip_qkv=0.5),
    "gpt_oss": _of(
        "GptOss", **_MIXTURE, num_hidden_layers=4, sliding_window=WINDOW, layer_types=_ALTERNATING
    ),
}
"""Family name (`model_type`) to a function that makes its tiny configuration."""

FURTHER: dict[str, Callable[[], PretrainedConfig]] = {
    "apertus": _of("Apertus"),
    "arcee": _of("Arcee", **_WIDE_HEADS),
    "biogpt": _of("BioGpt", num_key_value_heads=None),
    "ctrl": _gpt("CTRL", dff=56),
    "ernie4_5": _of("Ernie4_5", **_WIDE_HEADS, use_bias=True),
    "exaone4": _of("Exaone4", num_hidden_layers=4, sliding_window=WINDOW, layer_types=_ALTERNATING),
    "glm4": _of("Glm4", head_dim=8, rope_parameters=_PARTIAL),
    "gpt_bigcode": _gpt("GPTBigCode", n_inner=56),
    "helium": _of("Helium", head_dim=8),
    "hunyuan_v1_dense": _of("HunYuanDenseV1", **_WIDE_HEADS),
    "ministral3": _of("Ministral3", **_WIDE_HEADS, rope_parameters=_SCALED_BY_POSITION),
    "nemotron": _of("Nemotron", rope_parameters=_PARTIAL),
    "olmo3": _of("Olmo3", num_hidden_layers=4, sliding_window=WINDOW, layer_types=_ALTERNATING),
    "seed_oss": _of("SeedOss", **_WIDE_HEADS),
    "youtu": _of(
        "Youtu",
        num_key_value_heads=6,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,
    ),
}
"""Families, all dense, that are captured in every run of the tests, and put through passes in few of them."""

LAYER_WINDOWS: dict[str, list[int]] = {
    "qwen2": [0, 0, WINDOW, WINDOW],
    "mistral": [WINDOW] * 3,
    "gemma2": [WINDOW, 0, WINDOW, 0],
    "gemma3_text": [WINDOW, WINDOW, 0, WINDOW],
    "phi3": [WINDOW] * 3,
    "cohere2": [WINDOW, 0, WINDOW, 0],
    "starcoder2": [WINDOW] * 3,
    "exaone4": [WINDOW, 0, WINDOW, 0],
    "olmo3": [WINDOW, 0, WINDOW, 0],
    "mixtral": [WINDOW] * 3,
    "gpt_oss": [WINDOW, 0, WINDOW, 0],
}
"""The window of each layer of the families that have one; 0 sees everything."""

MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"})
"""The families whose blocks are mixtures of experts."""


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A BF16 model with random weights, so large that every layer shows in the logits (std near 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.4 / parameter.shape[-1] ** 0.5)
            else:  # norms, biases and sinks keep their level and get something of their own
                parameter.data += torch.randn(parameter.shape).to(parameter.dtype) * 0.2
    return model

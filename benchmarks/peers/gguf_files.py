"""Writes the BF16 weights of a Llama-layout Hugging Face folder as GGUF, and lets llama.cpp quantise that.

The files hold no tokenizer: the benchmark feeds token ids. Quantised files keep the embedding, which is the
output matrix too, at 8 bits, as llama.cpp's own tool does for matrices of this width.

Run by the peers' Python: `gguf_files.py FOLDER OUTPUT_DIRECTORY` writes bf16.gguf, q4_0.gguf and mxfp4.gguf.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["FORMATS"]

FORMATS = ("bf16", "q4_0", "mxfp4")

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _stored(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the checkpoint as BF16 bits in uint16."""
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        size = int(data[:8].view("<u8")[0])
        for name, entry in json.loads(bytes(data[8 : 8 + size])).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} is {entry['dtype']}, and only BF16 is handled here")
            begin, end = entry["data_offsets"]
            yield name, data[8 + size + begin : 8 + size + end].view("<u2").reshape(entry["shape"])


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_INNER[inner]}.weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of Q or K: llama.cpp rotates neighbours, transformers the two halves of a head."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_bf16(folder: Path, target: Path) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"{folder} is {config['model_type']}, and only the Llama layout is handled here")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim", config["hidden_size"] // heads))
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, stored in _stored(folder):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            stored = _interleaved(stored, heads if "q_proj" in name else kv_heads)
        if stored.ndim == 1:  # llama.cpp wants its norms in float32
            writer.add_tensor(_name(name), (stored.astype(np.uint32) << 16).view(np.float32))
        else:
            bits = np.ascontiguousarray(stored).view(np.uint8)
            writer.add_tensor(_name(name), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantise(source: Path, target: Path, file_type: int) -> None:
    import llama_cpp.llama_cpp as llama

    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.token_embedding_type = llama.GGML_TYPE_Q8_0
    parameters.output_tensor_type = llama.GGML_TYPE_Q8_0
    # Without `pure` the type named after MXFP4 leaves all but the experts of a mixture at 8 bits.
    parameters.pure = True
    if llama.llama_model_quantize(bytes(source), bytes(target), parameters):
        raise SystemExit(f"llama.cpp cannot quantise {source}")


def main() -> None:
    import llama_cpp.llama_cpp as llama

    folder, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    _write_bf16(folder, output / "bf16.gguf")
    _quantise(output / "bf16.gguf", output / "q4_0.gguf", llama.LLAMA_FTYPE_MOSTLY_Q4_0)
    _quantise(output / "bf16.gguf", output / "mxfp4.gguf", llama.LLAMA_FTYPE_MOSTLY_MXFP4_MOE)
    for name in FORMATS:
        types: dict[str, int] = {}
        for tensor in gguf.GGUFReader(output / f"{name}.gguf").tensors:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
        print(name, {kind: f"{size / 1e6:.1f} MB" for kind, size in types.items()})


if __name__ == "__main__":
    main()
